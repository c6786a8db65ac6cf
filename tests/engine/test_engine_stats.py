"""What an engine tells of itself while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams


def test_an_engine_tells_its_idle_time_and_its_tokens(tiny_model: Callable[..., Path]) -> None:
    engine = Engine(EngineConfig(model=str(tiny_model("llama")), device="cpu"))
    waited = engine.stats()
    assert waited.idle_seconds == pytest.approx(waited.starved_seconds) and waited.num_sampled_tokens == 0
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    for name in ("a", "b"):
        engine.add_request(
            Request(request_id=name, prompt_token_ids=np.array([3, 5, 7], dtype=np.int32), sampling_params=params)
        )
    arrived = engine.stats()
    started = time.perf_counter()
    engine.step()
    while engine.has_unfinished():
        engine.step()
    elapsed = time.perf_counter() - started
    done = engine.stats()
    assert done.num_sampled_tokens == done.num_output_tokens == 12
    assert done.num_computed_tokens == 2 * (3 + 5), "the last token of a row is sampled, never computed"
    assert done.starved_seconds - arrived.starved_seconds < elapsed / 10
    assert done.idle_seconds - arrived.idle_seconds < elapsed / 2, "it computes most of the time"
    assert engine.stats().starved_seconds > done.starved_seconds, "without a row it starves again"
