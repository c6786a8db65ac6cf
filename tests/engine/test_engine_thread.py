"""One engine under many callers: isolation, death, silence, shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


class Outputs:
    """Takes delivery."""

    def __init__(self) -> None:
        self.all: dict[str, RequestOutput] = {}
        self._arrived = threading.Condition()

    def take(self, output: RequestOutput) -> None:
        with self._arrived:
            assert output.request_id not in self.all, "delivered once"
            self.all[output.request_id] = output
            self._arrived.notify_all()

    def wait_for(self, count: int) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.all) >= count, timeout=120)


def test_callers_get_their_own_outputs(served: EngineThread) -> None:
    outputs = [Outputs() for _ in range(6)]
    for caller in range(6):
        served.submit(requests(caller, 12), outputs[caller].take)
    for caller in range(6):
        outputs[caller].wait_for(12)
        for index in range(12):
            output = outputs[caller].all[str(index)]
            assert output.prompt_token_ids == [3 + caller, 5, 7 + index]
            assert len(output.outputs[0].token_ids) == 8
    assert served.death is None and served.seconds_silent == 0.0


def test_a_short_request_does_not_wait_for_a_long_one(served: EngineThread) -> None:
    long, short = Outputs(), Outputs()
    served.submit(requests(0, 1, max_tokens=1000), long.take)
    served.submit(requests(1, 2, max_tokens=2), short.take)
    short.wait_for(2)
    assert not long.all
    long.wait_for(1)


def test_a_refused_request_is_an_output_and_the_others_finish(served: EngineThread) -> None:
    bad = Request(request_id="bad", prompt_token_ids=np.array([9999], dtype=np.int32), sampling_params=SamplingParams())
    good = requests(0, 2)
    outputs = Outputs()
    served.submit([good[0], bad, good[1]], outputs.take)
    outputs.wait_for(3)
    assert (outputs.all["bad"].error or "").startswith("ValueError: prompt_token_ids holds 9999")
    assert outputs.all["0"].error is None and outputs.all["1"].error is None


def test_a_request_that_breaks_the_checks_is_an_output_too(served: EngineThread, engine: Engine) -> None:
    original = engine.check_request

    def breaking(request: Request) -> Any:
        if len(request.prompt_token_ids) == 1:
            raise TypeError("unhashable type: 'list'")
        return original(request)

    engine.check_request = breaking  # type: ignore[method-assign]
    bad = Request(request_id="bad", prompt_token_ids=np.array([9], dtype=np.int32), sampling_params=SamplingParams())
    outputs = Outputs()
    served.submit([*requests(0, 1), bad], outputs.take)
    outputs.wait_for(2)
    assert outputs.all["bad"].error == "TypeError: unhashable type: 'list'"
    assert outputs.all["0"].error is None and served.death is None


def test_a_death_is_told_with_its_cause(engine: Engine) -> None:
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
    served.submit(requests(0, 3), Outputs().take)
    patience = time.monotonic() + 60
    while served.death is None and time.monotonic() < patience:
        time.sleep(0.01)
    assert isinstance(served.death, MemoryError)
    with pytest.raises(EngineDeadError, match="MemoryError: no room on the device"):
        served.submit(requests(1, 1), Outputs().take)
    served.shutdown()


def test_silence_is_measured_while_there_is_something_to_do(engine: Engine) -> None:
    go_on = threading.Event()

    def hanging() -> list[RequestOutput]:
        go_on.wait(60)
        raise RuntimeError("enough")

    engine.step = hanging  # type: ignore[method-assign]
    served = EngineThread(engine)
    assert served.seconds_silent == 0.0
    served.submit(requests(0, 1), Outputs().take)
    time.sleep(0.3)
    assert 0.2 < served.seconds_silent < 30
    go_on.set()
    served.shutdown()


def test_after_shutdown_nothing_is_taken(engine: Engine) -> None:
    served = EngineThread(engine)
    outputs = Outputs()
    served.submit(requests(0, 4, max_tokens=1000), outputs.take)
    while served.stats().num_running == 0:
        pass
    served.shutdown()
    assert not outputs.all and served.death is None
    with pytest.raises(EngineDeadError, match="shut down"):
        served.submit(requests(1, 1), outputs.take)


def test_a_request_that_is_taken_in_without_end_is_silence(engine: Engine) -> None:
    """A replica that makes no step hangs, whatever else it does; one that takes in request after request does not."""
    original, ends, began = engine.check_request, threading.Event(), threading.Event()
    silences: list[float] = []

    def endless(request: Request) -> Any:
        if len(request.prompt_token_ids) == 1:
            began.set()
            assert ends.wait(60)
            raise ValueError("it took too long")
        silences.append(thread.seconds_silent)
        time.sleep(0.05)
        return original(request)

    engine.check_request = endless  # type: ignore[method-assign]
    thread = EngineThread(engine)
    outputs = Outputs()
    thread.submit(requests(0, 20, max_tokens=1), outputs.take)
    outputs.wait_for(20)
    assert len(silences) == 20 and silences[-1] < 0.05 * 19, "it took in one request after the other"
    bad = Request(request_id="bad", prompt_token_ids=np.array([9], dtype=np.int32), sampling_params=SamplingParams())
    thread.submit([bad], outputs.take)
    assert began.wait(60)
    deadline = time.monotonic() + 60
    while thread.seconds_silent < 0.3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert thread.seconds_silent >= 0.3
    ends.set()
    outputs.wait_for(21)
    assert thread.death is None
    thread.shutdown()


def test_whatever_the_checks_raise_is_the_requests_error(served: EngineThread, engine: Engine) -> None:
    original = engine.check_request

    def breaking(request: Request) -> Any:
        if len(request.prompt_token_ids) == 1:
            raise OSError(36, "File name too long")
        return original(request)

    engine.check_request = breaking  # type: ignore[method-assign]
    bad = Request(request_id="bad", prompt_token_ids=np.array([9], dtype=np.int32), sampling_params=SamplingParams())
    outputs = Outputs()
    served.submit([*requests(0, 1), bad], outputs.take)
    outputs.wait_for(2)
    assert "File name too long" in (outputs.all["bad"].error or "") and served.death is None
