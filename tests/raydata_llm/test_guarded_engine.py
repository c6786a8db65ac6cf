"""Deaths of the engine: what is run again, and who is blamed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine.engine_thread import EngineDeadError
from raydata_llm.engine.request import CompletionOutput, Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.guarded_engine import EngineLostError, GuardedEngine, RunningEngine

POISON = 666


class MortalEngine:
    """Takes all callers' requests together, and dies with all of them when one has the poison token."""

    def __init__(self) -> None:
        self._dead = threading.Event()
        self.is_shut_down = False

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        if any(POISON in request.prompt_token_ids for request in requests):
            self._dead.set()
        if self._dead.wait(0.02):
            raise EngineDeadError("the engine died of RuntimeError: poison")
        return [
            RequestOutput(request.request_id, [1], [CompletionOutput(0, [int(request.request_id)], "stop")])
            for request in requests
        ]

    def shutdown(self) -> None:
        self.is_shut_down = True


class Engines:
    """Makes engines, and remembers them."""

    def __init__(self, limit: int = 100) -> None:
        self.made: list[MortalEngine] = []
        self._limit = limit

    def start(self) -> tuple[RunningEngine, Mapping[str, Any]]:
        if len(self.made) == self._limit:
            raise RuntimeError("the device is lost")
        self.made.append(MortalEngine())
        return self.made[-1], {"temperature": 0.5}


def requests(first: int, count: int, poison: int | None = None) -> list[Request]:
    return [
        Request(
            request_id=str(number),
            prompt_token_ids=np.array([POISON if number == poison else 5], np.int32),
            sampling_params=SamplingParams(),
        )
        for number in range(first, first + count)
    ]


def test_requests_come_back_in_order() -> None:
    engines = Engines()
    guarded = GuardedEngine(engines.start)
    assert [output.request_id for output in guarded.generate(requests(0, 3))] == ["0", "1", "2"]
    assert guarded.default_sampling_params == {"temperature": 0.5} and len(engines.made) == 1


@pytest.mark.parametrize("poison", [0, 5, 6])
def test_a_request_that_kills_engines_is_the_only_one_that_fails(poison: int) -> None:
    engines = Engines()
    outputs = GuardedEngine(engines.start).generate(requests(0, 7, poison))
    assert [output.request_id for output in outputs] == [str(number) for number in range(7)]
    assert [output.error for output in outputs if output.error] == [
        "EngineDeadError: the engine died of RuntimeError: poison"
    ]
    assert outputs[poison].error
    assert len(engines.made) <= 6, "one for the first run, one alone, one a halving"
    assert all(engine.is_shut_down for engine in engines.made[:-1])


def test_blocks_that_died_with_another_are_run_again_whole() -> None:
    engines = Engines()
    guarded = GuardedEngine(engines.start)
    blocks = [requests(10 * block, 10, poison=35) for block in range(8)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(guarded.generate, blocks))
    for block, outputs in enumerate(results):
        assert [int(output.request_id) for output in outputs] == list(range(10 * block, 10 * block + 10))
    assert [output.request_id for outputs in results for output in outputs if output.error] == ["35"]


def test_an_engine_that_cannot_be_replaced_is_lost() -> None:
    guarded = GuardedEngine(Engines(limit=1).start)
    with pytest.raises(EngineLostError, match="RuntimeError: the device is lost"):
        guarded.generate(requests(0, 4, poison=1))


def test_other_errors_are_the_callers() -> None:
    class Wrong(MortalEngine):
        def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
            raise TypeError("a mistake")

    guarded = GuardedEngine(lambda: (Wrong(), {}))
    with pytest.raises(TypeError, match="a mistake"):
        guarded.generate(requests(0, 1))
