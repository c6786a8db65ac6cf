"""The simulated peak of block use."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from raydata_llm.engine.block_forecast import BlockForecast

Row = tuple[int, int, int]


def brute_force_peak(rows: list[Row], block_size: int) -> int:
    return max(
        sum(-(-(tokens + t) // block_size) - shared for tokens, remaining, shared in rows if remaining >= t)
        for t in range(max(remaining for _, remaining, _ in rows) + 1)
    )


def forecast_of(rows: list[Row], block_size: int, base: int = 0, room: int = 0) -> BlockForecast:
    columns = np.array(rows, dtype=np.int32).reshape(-1, 3).T
    return BlockForecast(*columns, block_size=block_size, base=base, room=room)


def some_rows(data: st.DataObject, block_size: int, min_size: int) -> list[Row]:
    counts = data.draw(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60)), min_size=min_size, max_size=12))
    return [(tokens, left, data.draw(st.integers(0, (tokens - 1) // block_size))) for tokens, left in counts]


@settings(deadline=None)
@given(block_size=st.integers(1, 9), data=st.data())
def test_peak_equals_a_simulation_of_every_step(block_size: int, data: st.DataObject) -> None:
    rows = some_rows(data, block_size, min_size=1)
    assert forecast_of(rows, block_size, base=7).peak == brute_force_peak(rows, block_size) + 7


@settings(deadline=None)
@given(block_size=st.integers(1, 9), data=st.data(), limit=st.integers(0, 150))
def test_rows_are_added_as_long_as_the_peak_of_all_stays_within(
    block_size: int, data: st.DataObject, limit: int
) -> None:
    rows, more = some_rows(data, block_size, min_size=0), some_rows(data, block_size, min_size=1)
    forecast, base = forecast_of(rows, block_size, room=len(more)), 0
    for index, row in enumerate(more):
        peak = brute_force_peak([*rows, row], block_size) + base + index
        assert forecast.add_within(limit, *row, base=index) == (peak <= limit)
        if peak <= limit:
            rows, base = [*rows, row], base + index
            assert forecast.peak == peak


def test_no_sequences_hold_no_blocks() -> None:
    assert forecast_of([], 16).peak == 0
