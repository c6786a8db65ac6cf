"""The benchmark of many rows compares steps that are alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.benchmarks.bench_many import Step, step_ratios


def _waves(rows_of: Callable[[int], int], slower_after: float = math.inf, count: int = 20) -> list[Step]:
    """Rows of 64 tokens that decode 512 more in lockstep, wave after wave; some steps stand still."""
    rng = np.random.default_rng(0)
    now, steps = 0.0, []
    for wave in range(count):
        rows = rows_of(wave)
        for _ in range(5):
            now += 0.05
            steps.append(Step(now, rows, rows + 16384, 0.1))
        for length in range(65, 576):
            seconds = (2e-3 + 4e-8 * rows * length) * (1.1 if now >= slower_after else 1.0)
            now += seconds * (5 if rng.random() < 0.02 else 1)
            steps.append(Step(now, rows, rows, math.ceil(length / 64) * rows / 10_000))
    return steps


def test_waves_that_are_alike_give_one_although_tenths_cut_them_anywhere() -> None:
    assert np.allclose(step_ratios(_waves(lambda wave: 1024)), 1.0, atol=0.002)


def test_a_few_rows_less_are_compared_and_many_are_not() -> None:
    ratios = step_ratios(_waves(lambda wave: 1019 if wave < 5 else 1024))
    assert np.allclose(ratios, 1.0, atol=0.006), ratios
    ratios = step_ratios(_waves(lambda wave: 1024 if wave < 10 else 512))
    assert ratios[1] == 1.0 and math.isnan(ratios[8]), ratios


def test_steps_that_became_slower_are_told() -> None:
    ratios = step_ratios(_waves(lambda wave: 1024, slower_after=100.0))
    assert np.allclose(ratios[:4], 1.0, atol=0.002) and np.allclose(ratios[8:], 1.1, atol=0.002), ratios
