"""What an engine tells of itself while it runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.optimism import optimistic_admission


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


def test_a_request_tells_when_it_was_scheduled_and_written(tiny_model: Callable[..., Path]) -> None:
    # One slot: the second request waits for the first.
    engine = Engine(EngineConfig(model=str(tiny_model("llama")), device="cpu", max_num_seqs=1))
    began = time.time()
    for name, count in (("a", 5), ("b", 1)):
        engine.add_request(_request(name, max_tokens=count, n=1))
    outputs = _run(engine)
    first, second = (outputs[name].metrics for name in ("a", "b"))
    assert first is not None and second is not None
    for stats, count in ((first, 5), (second, 1)):
        assert stats.num_generation_tokens == count and not stats.is_corrupted
        assert began <= stats.arrival_time <= time.time()
        assert 0 < stats.queued_ts <= stats.scheduled_ts < stats.first_token_ts <= stats.last_token_ts
        assert 0 < stats.first_token_latency < time.time() - began
        waited = stats.first_token_ts - stats.queued_ts
        assert waited == pytest.approx(stats.first_token_latency, abs=0.05), "it was queued when it was made"
    assert first.first_token_ts < first.last_token_ts <= second.scheduled_ts, "it had to wait for the slot"
    assert second.first_token_ts == second.last_token_ts, "one token is the first and the last"


def test_times_of_n_outputs_are_the_first_and_the_last_ones(tiny_model: Callable[..., Path]) -> None:
    engine = Engine(EngineConfig(model=str(tiny_model("llama")), device="cpu", max_num_seqs=1))
    engine.add_request(_request("a", max_tokens=3, n=2))
    stats = _run(engine)["a"].metrics
    assert stats is not None and stats.num_generation_tokens == 6
    # Its outputs ran one after the other: six steps of decoding lie between.
    assert stats.last_token_ts - stats.first_token_ts > stats.first_token_ts - stats.scheduled_ts > 0


def test_a_preemption_changes_none_of_the_first_times(tiny_model: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu", block_size=4, num_gpu_blocks_override=12)
    engine = Engine(dataclasses.replace(config, max_model_len=40, enable_prefix_caching=False))
    for name in ("a", "b"):
        engine.add_request(_request(name, max_tokens=30, n=1))
    with optimistic_admission():
        engine.step()
        seen = {name: dataclasses.replace(one.stats) for name, one in engine._unfinished.items()}
        outputs = _run(engine)
    assert engine.stats().num_preemptions > 0
    for name, output in outputs.items():
        assert output.metrics is not None and seen[name].first_token_ts > 0
        for field in ("scheduled_ts", "first_token_ts", "first_token_latency"):
            assert getattr(output.metrics, field) == getattr(seen[name], field)


def test_an_aborted_request_has_the_times_it_got_to(tiny_model: Callable[..., Path]) -> None:
    engine = Engine(EngineConfig(model=str(tiny_model("llama")), device="cpu", max_num_seqs=1))
    for name in ("runs", "waits"):
        engine.add_request(_request(name, max_tokens=9, n=1))
    engine.step()
    runs, waits = (output.metrics for output in sorted(engine.abort_all(), key=lambda one: one.request_id))
    assert runs is not None and runs.num_generation_tokens == 1 and runs.last_token_ts == runs.first_token_ts > 0
    assert waits is not None and waits.queued_ts > 0
    assert waits.scheduled_ts == waits.first_token_ts == waits.last_token_ts == waits.first_token_latency == 0


def _request(name: str, *, max_tokens: int, n: int) -> Request:
    params = SamplingParams(temperature=float(n > 1), max_tokens=max_tokens, n=n, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=np.array([3, 5, 7], dtype=np.int32), sampling_params=params)


def _run(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs
