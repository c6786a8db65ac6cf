"""Draws of output lengths."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from raydata_llm.engine.length_model import LengthModel


def model_of(lengths: list[int], most: int, running: list[int] | None = None) -> LengthModel:
    model = LengthModel()
    for length in lengths:
        model.observe(length, most)
    written = np.array(running or [], dtype=np.int32)
    model.take_running(written, np.full(len(written), most, dtype=np.int32))
    return model


def drawn(model: LengthModel, written: list[int], most: int, may_stop: bool = True) -> list[int]:
    count = len(written)
    rows = np.array(written, dtype=np.int32), np.full(count, most, dtype=np.int32), np.full(count, may_stop)
    lengths: list[int] = model.predict(*rows, np.arange(count)).tolist()
    return lengths


def test_rows_count_in_full_until_enough_have_finished() -> None:
    assert drawn(model_of([10] * 15, 100), [0], 100) == [100]
    assert drawn(model_of([10] * 16, 100), [0], 100) == [10]


def test_draws_are_distributed_as_the_rows_that_ended() -> None:
    lengths = np.random.default_rng(0).lognormal(5.0, 0.5, size=2000).clip(1, 1000).astype(int)
    draws = drawn(model_of(lengths.tolist(), 1000), [0] * 500, 1000)
    quantiles = [0.1, 0.5, 0.9]
    np.testing.assert_allclose(np.quantile(draws, quantiles), np.quantile(lengths, quantiles), rtol=0.05)
    assert abs(np.mean(draws) / lengths.mean() - 1) < 0.02


def test_rows_that_run_are_evidence_too() -> None:
    """Of 400 rows that started together, those that ended by token 100 are the short ones."""
    lengths = np.random.default_rng(1).exponential(300.0, size=400).clip(1, 2000).astype(int)
    ended, running = lengths[lengths <= 100], lengths[lengths > 100]
    draws = drawn(model_of(ended.tolist(), 2000, [100] * len(running)), [0] * 1000, 2000)
    assert abs(np.mean(draws) / 300 - 1) < 0.2, "without the rows that run it would be some 45"


def test_draws_rise_with_what_a_row_has_written() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, size=2000)
    model = model_of(lengths.tolist(), 100)
    means = [np.mean(drawn(model, [written] * 200, 100)) for written in (0, 20, 60, 99)]
    np.testing.assert_allclose(means, [50.5, 60.5, 80.5, 100], atol=1.5)


def test_a_row_keeps_its_place_in_the_distribution() -> None:
    model = model_of(list(range(1, 101)), 100)
    alone = model.predict(*(np.array([value]) for value in (7, 100, True, 123)))
    among = model.predict(np.full(300, 7), np.full(300, 100), np.full(300, True), np.arange(300))
    assert alone[0] == among[123]


def test_rows_that_cannot_stop_early_count_in_full() -> None:
    model = model_of([1] * 100, 100)
    assert drawn(model, [0], 100) == [1]
    assert drawn(model, [0], 100, may_stop=False) == [100]


@given(
    st.lists(st.integers(1, 100), min_size=16, max_size=200),
    st.lists(st.integers(0, 99), max_size=20),
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)), min_size=1, max_size=20),
)
def test_prediction_lies_between_written_and_allowed(
    lengths: list[int], running: list[int], rows: list[tuple[int, int]]
) -> None:
    model = model_of(lengths, 100, running)
    most = np.array([most for _, most in rows])
    written = np.minimum(np.array([written for written, _ in rows]), most)
    predicted = model.predict(written, most, np.full(len(rows), True), np.arange(len(rows)))
    assert (predicted >= np.minimum(written + 1, most)).all()
    assert (predicted <= most).all()
