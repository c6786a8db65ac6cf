"""Length prediction and the simulated peak of block use."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from raydata_llm.engine.length_model import LengthModel, peak_blocks


def brute_force_peak(rows: list[tuple[int, int, int]], block_size: int) -> int:
    return max(
        sum(-(-(tokens + t) // block_size) - shared for tokens, remaining, shared in rows if remaining >= t)
        for t in range(max(remaining for _, remaining, _ in rows) + 1)
    )


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60)), min_size=1, max_size=12),
    block_size=st.integers(1, 9),
    data=st.data(),
)
def test_peak_equals_a_simulation_of_every_step(
    rows: list[tuple[int, int]], block_size: int, data: st.DataObject
) -> None:
    whole = [(tokens, left, data.draw(st.integers(0, (tokens - 1) // block_size))) for tokens, left in rows]
    tokens, remaining, shared = (np.array(column, dtype=np.int32) for column in zip(*whole, strict=True))
    assert peak_blocks(tokens, remaining, shared, block_size) == brute_force_peak(whole, block_size)


def test_no_sequences_hold_no_blocks() -> None:
    none = np.zeros(0, dtype=np.int32)
    assert peak_blocks(none, none, none, 16) == 0


def test_rows_count_in_full_until_enough_have_finished() -> None:
    model = LengthModel()
    for _ in range(63):
        model.observe(10, 100)
    arguments = np.array([0]), np.array([100]), np.array([True])
    assert model.predict(*arguments).tolist() == [100]
    model.observe(10, 100)
    assert model.predict(*arguments).tolist() == [10]


def test_prediction_rises_with_what_a_row_has_written() -> None:
    model = LengthModel()
    rng = np.random.default_rng(0)
    for length in rng.integers(1, 101, size=2000):
        model.observe(int(length), 100)
    written = np.array([0, 20, 60, 99], dtype=np.int32)
    predicted = model.predict(written, np.full(4, 100, dtype=np.int32), np.full(4, True))
    assert (np.diff(predicted) > 0).all()
    assert abs(int(predicted[0]) - 58) <= 3, "mean 50.5 plus a quarter of the deviation, 28.9"
    assert predicted[-1] == 100


def test_rows_that_cannot_stop_early_count_in_full() -> None:
    model = LengthModel()
    for _ in range(100):
        model.observe(1, 100)
    predicted = model.predict(np.array([0, 0]), np.array([100, 100]), np.array([True, False]))
    assert predicted.tolist() == [1, 100]


@given(
    st.lists(st.integers(1, 100), min_size=64, max_size=200),
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)), min_size=1, max_size=20),
)
def test_prediction_lies_between_written_and_allowed(lengths: list[int], rows: list[tuple[int, int]]) -> None:
    model = LengthModel()
    for length in lengths:
        model.observe(length, 100)
    most = np.array([most for _, most in rows])
    written = np.minimum(np.array([written for written, _ in rows]), most)
    predicted = model.predict(written, most, np.full(len(rows), True))
    assert (predicted >= np.minimum(written + 1, most)).all()
    assert (predicted <= most).all()
