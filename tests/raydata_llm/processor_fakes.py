"""A model-less engine and a Ray session for the processor's tests."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from raydata_llm.engine.request import CompletionOutput, Logprob, Request, RequestOutput
from raydata_llm.guarded_engine import EngineLostError, RunningEngine
from raydata_llm.replica import EngineFactory

# The pool's actors do not have the tests' folder on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

MAX_MODEL_LEN = 200


@contextmanager
def ray_session(**environment: str) -> Iterator[None]:
    """A Ray of two CPUs whose driver and workers have these environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
            runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", **environment}},
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


class EchoEngine:
    """Answers with the prompt's own tokens, backwards; `stop_reason` says in which process."""

    def __init__(self, engine_kwargs: Mapping[str, Any], seconds: float = 0.02) -> None:
        self.engine_kwargs = engine_kwargs
        self._seconds = seconds
        self._lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self._seconds)
        try:
            return [self._answer(request) for request in requests]
        finally:
            with self._lock:
                self.at_once -= 1

    def shutdown(self) -> None:
        pass

    def _answer(self, request: Request) -> RequestOutput:
        prompt = [int(token_id) for token_id in request.prompt_token_ids]
        params = request.sampling_params
        if len(prompt) > MAX_MODEL_LEN:
            error = f"ValueError: the prompt has {len(prompt)} tokens, max_model_len={MAX_MODEL_LEN} allows fewer"
            return RequestOutput(request.request_id, prompt, error=error)
        token_ids = prompt[::-1][: params.max_tokens]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [{token_id: Logprob(-0.5, 1), 7: Logprob(-2.0, 2)} for token_id in token_ids]
        outputs = [
            CompletionOutput(index, token_ids, "length", f"process {os.getpid()}", "", -1.5, logprobs)
            for index in range(params.n)
        ]
        return RequestOutput(request.request_id, prompt, outputs)


def start_echo_engine(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    """Stands in for `raydata_llm.replica.start_engine`."""
    return EchoEngine(engine_kwargs), {"temperature": 0.25}


def start_nothing(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    """An engine that cannot start."""
    raise ValueError("kv_cache_memory_bytes=1 is not valid: give 4096 or more for one row of max_model_len=200")


def start_together(folder: Path, size: int, seconds: float) -> EngineFactory:
    """Starts engines that are ready when all of the pool's are, so that each gets its share of a small dataset."""

    def start(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        (folder / str(os.getpid())).touch()
        patience = time.monotonic() + 60
        while len(list(folder.iterdir())) < size and time.monotonic() < patience:
            time.sleep(0.05)
        return EchoEngine(engine_kwargs, seconds), {"temperature": 0.25}

    return start


class LostEngine(EchoEngine):
    """Dies for good, process after process, so many times."""

    def __init__(self, engine_kwargs: Mapping[str, Any], folder: Path, deaths: int) -> None:
        super().__init__(engine_kwargs)
        self._folder = folder
        self._deaths = deaths

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        if len(list(self._folder.iterdir())) < self._deaths:
            (self._folder / str(os.getpid())).touch()
            raise EngineLostError("a new engine does not start")
        return super().generate(requests)


def start_lost(folder: Path, deaths: int) -> EngineFactory:
    """Starts engines whose processes are lost with them, so many times."""

    def start(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        return LostEngine(engine_kwargs, folder, deaths), {}

    return start
