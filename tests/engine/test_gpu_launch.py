"""Launching a step never waits for the device: torch raises where it would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_runner import LaunchedStep, ModelRunner
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.optimism import optimistic_admission
from tests.engine.tiny_shape import write_tiny_shape

pytestmark = pytest.mark.gpu

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    "adjusted": {"logit_bias": {7: 1.0}, "min_tokens": 4, "allowed_token_ids": [7, 8, 9, 10]},
}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("kind", PARAMS)
def test_a_launch_never_waits(kind: str, enforce_eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = ModelRunner.launch

    def strict(*args: Any, **kwargs: Any) -> LaunchedStep | None:
        with no_waiting():
            return launch(*args, **kwargs)

    monkeypatch.setattr(ModelRunner, "launch", strict)
    engine = Engine(
        EngineConfig(
            model=str(write_tiny_shape(tmp_path)),
            load_format="dummy",
            enforce_eager=enforce_eager,
            max_num_seqs=16,
            max_num_batched_tokens=64,
            num_gpu_blocks_override=8,
            max_model_len=256,
        )
    )
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=120, **PARAMS[kind])
    shared = rng.integers(3, 500, size=70)
    for index in range(24):
        prompt = np.concatenate([shared, rng.integers(3, 500, size=5 + index)]).astype(np.int32)
        engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params, key=index))
    finished = 0
    with optimistic_admission():
        while engine.has_unfinished():
            finished += len(engine.step())
    assert finished == 24
    assert engine.stats().num_preemptions > 0, "the case is to cover preemption"


def test_the_check_finds_a_wait() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.zeros(1, device="cuda").item()
