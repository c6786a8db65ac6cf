"""What a group of engines refuses, and what it does when one of them dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine import engine_group
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.engine_group import EngineGroup
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams


def test_dead_engines_are_told_at_once(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(config: EngineConfig, *_: Any, **__: Any) -> Engine:
        return Engine(config)

    def failing() -> Any:
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(engine_group, "Engine", alone)
    monkeypatch.setattr(engine_group, "check_gpus", lambda *_: None)
    group = EngineGroup(EngineConfig(model=str(tiny_model("llama")), device="cpu"), 2)
    for member in group._members:
        monkeypatch.setattr(member.engine, "step", failing)
    prompt = np.array([5, 6, 7], dtype=np.int32)
    request = Request(request_id="0", prompt_token_ids=prompt, sampling_params=SamplingParams(max_tokens=2))
    began = time.monotonic()
    for message in ("has failed", "has failed", "all engines have died"):
        group.add_request(request)
        with pytest.raises(RuntimeError, match=message):
            while group.has_unfinished():
                group.step()
        group.abort_all()
    assert time.monotonic() - began < 30
    group.shutdown()


def test_logits_processors_are_refused(tiny_model: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu", logits_processors=["a_module:Processor"])
    with pytest.raises(ValueError, match="data_parallel_size=2"):
        EngineGroup(config, 2)
