"""A model-less engine and a Ray session for the processor's tests."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from raydata_llm.engine.engine_thread import EngineThread
from raydata_llm.engine.request import CompletionOutput, Logprob, Request, RequestOutput
from raydata_llm.replica import EngineFactory, RunningEngine
from tests.raydata_llm.patience import wait_until

# The pool's actors do not have the tests' folder on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

MAX_MODEL_LEN = 200


@contextmanager
def ray_session(**environment: str) -> Iterator[None]:
    """A Ray of two CPUs whose driver and workers have these environment variables.

    They are inherited: with a runtime_env each worker would start from nothing and take two seconds longer.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


class EchoEngine:
    """Answers with the prompt's own tokens, backwards; `stop_reason` says in which process."""

    max_num_seqs = 64

    def __init__(self, engine_kwargs: Mapping[str, Any], seconds: float = 0.02) -> None:
        self.engine_kwargs = engine_kwargs
        self._seconds = seconds
        self._running: list[Request] = []

    def add_request(self, request: Request) -> None:
        if len(request.prompt_token_ids) > MAX_MODEL_LEN:
            raise ValueError(
                f"the prompt has {len(request.prompt_token_ids)} tokens, max_model_len={MAX_MODEL_LEN} allows fewer"
            )
        self._running.append(request)

    def num_wanted(self) -> int:
        return 256

    def step(self) -> list[RequestOutput]:
        time.sleep(self._seconds)
        running, self._running = self._running, []
        return [self._answer(request) for request in running]

    def stats(self) -> Any:
        return None

    def shutdown(self) -> None:
        pass

    def _answer(self, request: Request) -> RequestOutput:
        prompt = [int(token_id) for token_id in request.prompt_token_ids]
        params = request.sampling_params
        token_ids = prompt[::-1][: params.max_tokens]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [{token_id: Logprob(-0.5, 1), 7: Logprob(-2.0, 2)} for token_id in token_ids]
        outputs = [
            CompletionOutput(index, token_ids, "length", f"process {os.getpid()}", "", -1.5, logprobs)
            for index in range(params.n)
        ]
        output = RequestOutput(request.request_id, prompt, outputs)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *({token_id: Logprob(-0.25, 1)} for token_id in prompt[1:])]
        return output


def serve(engine: Any) -> RunningEngine:
    """A fake engine under the real `EngineThread`."""
    return EngineThread(engine)


def start_echo_engine(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    """Stands in for `raydata_llm.replica.start_engine`."""
    return serve(EchoEngine(engine_kwargs)), {"temperature": 0.25}


def start_nothing(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    """An engine that cannot start."""
    raise ValueError("kv_cache_memory_bytes=1 is not valid: give 4096 or more for one row of max_model_len=200")


def start_together(folder: Path, size: int, seconds: float) -> EngineFactory:
    """Starts engines that are ready when all of the pool's are, so that each gets its share of a small dataset."""

    def start(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        (folder / str(os.getpid())).touch()
        wait_until(lambda: len(list(folder.iterdir())) >= size)
        return serve(EchoEngine(engine_kwargs, seconds)), {"temperature": 0.25}

    return start
