"""How many rows run where memory holds some of those that wait."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydata_llm.engine.block_manager import BlockManager
from raydata_llm.engine.request import Request
from raydata_llm.engine.row_target import RowTarget
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.scheduler_limits import SchedulerLimits
from raydata_llm.engine.sequence import Sequence

# A decode step of the llama-3.1-8b shape by rows, on an H100, in milliseconds.
MEASURED = {
    128: 6.3e-3,
    256: 7.1e-3,
    384: 9.1e-3,
    512: 10.3e-3,
    640: 13.2e-3,
    704: 15.7e-3,
    800: 16.4e-3,
    1024: 21.5e-3,
}


@pytest.mark.parametrize(
    ("num_fitting", "num_total", "rows"),
    [
        (668, 1024, 512),  # two rounds either way
        (668, 1300, 668),  # two rounds, where 512 takes three
        (668, 668, 668),  # they all fit
        (668, 100_000, 640),
        (850, 100_000, 800),
        (500, 100_000, 500),  # 384 is no cheaper a row
        (3000, 100_000, 3000),  # more than was measured
        (1, 5, 1),
    ],
)
def test_rows_whose_steps_take_least_are_run(num_fitting: int, num_total: int, rows: int) -> None:
    assert RowTarget(MEASURED).of(num_fitting, num_total) == rows


@given(st.integers(0, 2000), st.integers(0, 100_000))
def test_no_more_rows_than_fit_and_no_fewer_than_three_quarters(num_fitting: int, num_total: int) -> None:
    rows = RowTarget(MEASURED).of(num_fitting, num_total)
    assert 0.75 * num_fitting <= rows <= num_fitting
    assert RowTarget({}).of(num_fitting, num_total) == num_fitting


def most_running(row_target: RowTarget, num_rows: int, num_blocks: int, shortest: int = 64) -> int:
    """Rows that run at once at most, of 64 tokens in and `shortest` to 64 out, blocks of 16 tokens."""
    limits = SchedulerLimits(
        max_num_seqs=1024, max_num_batched_tokens=16384, max_model_len=256, block_size=16, max_penalty_seqs=0
    )
    scheduler = Scheduler(limits, BlockManager(num_blocks + 1), row_target)
    for index in range(num_rows):
        prompt = np.full(64, index, dtype=np.int32)
        max_tokens = 64 - index % (65 - shortest)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params)
        scheduler.add(Sequence(index, request, 0, prompt, 64, 64 + max_tokens, ()))
    most, num_done = 0, 0
    while num_done < num_rows:
        batch = scheduler.schedule(0)
        assert batch is not None
        most = max(most, scheduler.table.num_running)
        num_done += len(scheduler.update(batch, np.zeros(len(batch.sample_slots), dtype=np.int32)))
        scheduler.check_integrity()
    assert scheduler.num_preemptions == 0
    return most


def test_the_scheduler_runs_that_many_where_rows_end_together() -> None:
    blocks_of_668 = 668 * 8
    assert most_running(RowTarget(MEASURED), 1024, blocks_of_668) == 512
    assert most_running(RowTarget({}), 1024, blocks_of_668) == 668
    assert most_running(RowTarget(MEASURED), 600, blocks_of_668) == 600
    # Rows of other lengths make room one by one.
    assert most_running(RowTarget(MEASURED), 1024, blocks_of_668, 16) == most_running(
        RowTarget({}), 1024, blocks_of_668, 16
    )
    # With memory for all slots nothing is traded.
    assert most_running(RowTarget(MEASURED), 1100, 1100 * 8) == 1024
