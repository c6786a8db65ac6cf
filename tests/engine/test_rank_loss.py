"""A rank that dies, fails or hangs ends its engine soon, with what it said; no process is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine import local_ranks, rank_watch
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.local_ranks import LocalRanks
from raydata_llm.engine.rank_line import RankError
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams

# What a rank runs instead: its 20th step goes wrong.
FAULTY = """
import time
from raydata_llm.engine import rank_process
from raydata_llm.engine.worker import Worker
launch, count = Worker.launch, iter(range(10**9))
def faulty(self, batch, bitmask=None):
    if self._shard.place.rank == 1 and next(count) == 20:
        {fault}
    return launch(self, batch, bitmask)
Worker.launch = faulty
rank_process.main()
"""
TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
EACH = pytest.mark.parametrize("sizes", [TP2, pytest.param(PP2, marks=pytest.mark.slow)], ids=str)


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", num_attention_heads=8))


@contextmanager
def running(model: str, **settings: Any) -> Iterator[tuple[Engine, list[int]]]:
    """An engine with rows under way, and its ranks' process ids."""
    pids: list[int] = []

    class Noting(LocalRanks):
        def launch(self, address: Any, num_ranks: int) -> list[Any]:
            handles: list[Any] = super().launch(address, num_ranks)
            pids.extend(handle.pid for handle in handles)
            return handles

    engine = Engine(EngineConfig(model=model, device="cpu", max_model_len=900, **settings), launch_ranks=Noting)
    try:
        for index in range(6):
            params = SamplingParams(temperature=0.0, max_tokens=800, ignore_eos=True)
            prompt = np.arange(3, 20 + index, dtype=np.int32)
            engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params))
        yield engine, pids
    finally:
        engine.shutdown()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "ranks are left"


def death_of(engine: Engine, most_seconds: float) -> str:
    """Step until the engine dies; what it says."""
    began = time.monotonic()
    with pytest.raises(RankError) as raised:
        while time.monotonic() < began + most_seconds + 10:
            engine.step()
    assert time.monotonic() - began < most_seconds
    return str(raised.value)


@EACH
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_engine(model: str, sizes: dict[str, Any], rank: int) -> None:
    with running(model, **sizes) as (engine, pids):
        for _ in range(30):
            engine.step()
        os.kill(pids[rank], signal.SIGKILL)
        said = death_of(engine, 30)
    assert f"rank {rank}: killed by signal 9 (SIGKILL)" in said


@EACH
def test_an_error_comes_with_the_ranks_own_traceback(
    model: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "_CODE", FAULTY.format(fault="raise ArithmeticError('a faulty layer')"))
    with running(model, **sizes) as (engine, _):
        said = death_of(engine, 30)
    # Its own words first, and not those of the rank that lost its neighbour.
    assert said.index("ArithmeticError: a faulty layer") < said.find("gloo") % 10**9
    assert "in faulty" in said


def check_hang(model: str, fault: str, most_seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(local_ranks, "_CODE", FAULTY.format(fault=fault))
    with running(model, tensor_parallel_size=2) as (engine, _):
        return death_of(engine, most_seconds)


SLEEP, STOP = "time.sleep(3600)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"


def test_a_hung_rank_is_found_out_and_says_where_it_is(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_STANDSTILL_SECONDS", 5.0)
    said = check_hang(model, SLEEP, 30, monkeypatch)
    assert "rank 1 is at:" in said and "in faulty" in said


def test_a_stopped_rank_is_found_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_SILENCE_SECONDS", 4.0)
    assert "rank 1 of 2 hangs: no sign of life" in check_hang(model, STOP, 30, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [SLEEP, STOP])
def test_hung_ranks_are_found_out_within_30_seconds(model: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hang" in check_hang(model, fault, 30, monkeypatch)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide num_attention_heads=8.* 1, 2, 4, 8"),
        ({"pipeline_parallel_size": 9}, "pipeline_parallel_size=9 is more than the 3 layers"),
        ({"tensor_parallel_size": 2, "max_model_len": 512, "num_gpu_blocks_override": 1}, "max_model_len=512 needs"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 is not valid: give 1 or more"),
    ],
)
def test_what_ranks_cannot_meet_is_a_value_error(model: str, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Engine(EngineConfig(model=model, device="cpu", **settings))


def test_more_ranks_than_gpus_is_a_value_error(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"is 2 ranks, and this machine has 1 GPU"):
        Engine(EngineConfig(model=model, tensor_parallel_size=2))
