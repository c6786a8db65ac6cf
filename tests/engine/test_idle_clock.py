"""Idle seconds: what counts, and for which reason."""

from __future__ import annotations

from raydata_llm.engine.idle_clock import IdleClock


class Seconds:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_before_the_first_request_is_idle_and_starved() -> None:
    seconds = Seconds()
    clock = IdleClock(seconds)
    seconds.now = 103.0
    assert clock.seconds() == (3.0, 3.0)
    clock.work_arrived()
    seconds.now = 104.0
    clock.step_launched()
    seconds.now = 110.0
    assert clock.seconds() == (4.0, 3.0), "a second between steps, and three without a row"


def test_a_step_in_flight_is_not_idle_though_its_request_ended() -> None:
    seconds = Seconds()
    clock = IdleClock(seconds)
    clock.work_arrived()
    clock.step_launched()
    seconds.now = 105.0
    clock.work_ended()
    seconds.now = 107.0
    assert clock.seconds() == (0.0, 0.0)
    clock.steps_read()
    seconds.now = 110.0
    assert clock.seconds() == (3.0, 3.0)
    clock.work_arrived()
    seconds.now = 111.0
    assert clock.seconds() == (4.0, 3.0)
