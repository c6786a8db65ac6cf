"""One engine under many callers: order, isolation, death, shutdown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.engine_thread import EngineDeadError, EngineThread
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Engine:
    return Engine(EngineConfig(model=str(tiny_model("llama")), device="cpu"))


@pytest.fixture
def served(engine: Engine) -> Iterator[EngineThread]:
    thread = EngineThread(engine)
    yield thread
    thread.shutdown()


def requests(caller: int, count: int, max_tokens: int = 8) -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    prompts = [np.array([3 + caller, 5, 7 + index], dtype=np.int32) for index in range(count)]
    return [
        Request(request_id=f"{index}", prompt_token_ids=prompt, sampling_params=params)
        for index, prompt in enumerate(prompts)
    ]


def test_callers_get_their_own_results_in_order(served: EngineThread) -> None:
    results: dict[int, list[RequestOutput]] = {}

    def call(caller: int) -> None:
        results[caller] = served.generate(requests(caller, 12))

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for caller in range(6):
        prompts = [output.prompt_token_ids for output in results[caller]]
        assert prompts == [[3 + caller, 5, 7 + index] for index in range(12)]
        assert [output.request_id for output in results[caller]] == [str(index) for index in range(12)]
        assert all(len(output.outputs[0].token_ids) == 8 for output in results[caller])


def test_a_short_call_does_not_wait_for_a_long_one(served: EngineThread) -> None:
    long_done = threading.Event()

    def long_call() -> None:
        served.generate(requests(0, 1, max_tokens=1000))
        long_done.set()

    thread = threading.Thread(target=long_call)
    thread.start()
    served.generate(requests(1, 2, max_tokens=2))
    assert not long_done.is_set()
    thread.join(timeout=120)
    assert long_done.is_set()


def test_a_refused_request_is_a_result_and_the_others_finish(served: EngineThread) -> None:
    bad = Request(request_id="bad", prompt_token_ids=np.array([9999], dtype=np.int32), sampling_params=SamplingParams())
    good = requests(0, 2)
    results = served.generate([good[0], bad, good[1]])
    assert [result.error is None for result in results] == [True, False, True]
    assert results[1].request_id == "bad"
    assert results[1].error is not None
    assert results[1].error.startswith("ValueError: prompt_token_ids holds 9999")
    assert served.generate([]) == []


def test_a_death_is_told_to_all_callers_with_its_cause(engine: Engine) -> None:
    original = engine.step
    steps = 0

    def failing() -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise MemoryError("no room on the device")
        return original()

    engine.step = failing  # type: ignore[method-assign]
    served = EngineThread(engine)
    with pytest.raises(EngineDeadError, match="MemoryError: no room on the device") as raised:
        served.generate(requests(0, 3))
    assert isinstance(raised.value.__cause__, MemoryError)
    with pytest.raises(EngineDeadError, match="MemoryError"):
        served.generate(requests(1, 1))
    served.shutdown()


def test_shutdown_releases_waiting_callers(engine: Engine) -> None:
    served = EngineThread(engine)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            served.generate(requests(0, 4, max_tokens=1000))
        except EngineDeadError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while served.stats().num_running == 0:
        pass
    served.shutdown()
    thread.join(timeout=30)
    assert "shut down" in str(caught[0])
    with pytest.raises(EngineDeadError, match="shut down"):
        served.generate(requests(1, 1))
