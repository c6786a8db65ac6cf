"""How long an engine had no step in flight, and how much of that for want of requests.

Owns two sums of seconds. Knows no steps and no requests: the engine tells it when the first step in flight is launched,
when the last one is read, and when its first request comes and its last one ends.

A step is in flight from the start of its launch until its tokens are on the host. A GPU may start a little later and be
done a little earlier, so what is left of the wall time is an upper bound of the GPU's busy time.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class IdleClock:
    """Sums of idle seconds since it was made; reading it from another thread is safe.

    Args:
        now: Seconds on a clock that only goes forward.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._idle_since: float | None = now()
        self._workless_since: float | None = self._idle_since
        self._idle = self._starved = 0.0

    def work_arrived(self) -> None:
        """The engine has a request again."""
        self._starved += self._starved_now(self._now())
        self._workless_since = None

    def work_ended(self) -> None:
        """The engine has no request any more."""
        self._workless_since = self._now()

    def step_launched(self) -> None:
        """A step is about to be launched."""
        if self._idle_since is not None:
            self._idle += self._now() - self._idle_since
            self._idle_since = None

    def steps_read(self) -> None:
        """No step is in flight any more."""
        self._idle_since = self._now()

    def seconds(self) -> tuple[float, float]:
        """Seconds without a step in flight, and those of them without a request either."""
        now, since = self._now(), self._idle_since
        idle = self._idle + (0.0 if since is None else now - since)
        return idle, self._starved + self._starved_now(now)

    def _starved_now(self, now: float) -> float:
        idle_since, workless_since = self._idle_since, self._workless_since
        if idle_since is None or workless_since is None:
            return 0.0
        return now - max(idle_since, workless_since)
