"""The benchmark of many rows compares steps that are alike."""

from __future__ import annotations

import math

import numpy as np

from tests.benchmarks.bench_many import Step, step_ratios


def test_a_tenth_is_compared_with_steps_of_the_second_that_are_like_its_own() -> None:
    rng = np.random.default_rng(0)
    now, steps = 0.0, []
    for number in range(20_000):
        rows, kv_usage = int(rng.choice([512, 1024])), float(rng.choice([0.5, 0.97]))
        # Later steps are smaller on the whole, and slower by a tenth from the middle on; some stand still.
        if number > 10_000 and rng.random() < 0.5:
            rows = 512
        is_prefill = rng.random() < 0.3
        seconds = (rows * 1e-5 + kv_usage * 1e-2) * (1.1 if now >= 134 else 1.0) * (5 if rng.random() < 0.02 else 1)
        now += seconds + (0.05 if is_prefill else 0.0)
        steps.append(Step(now, rows, rows + 300 * is_prefill, kv_usage))
    ratios = step_ratios(steps)
    changed = next(number for number, step in enumerate(steps) if step.end >= 134)
    tenth = (steps[changed].end - steps[0].end) / (steps[-1].end - steps[0].end) * 10
    assert np.allclose(ratios[: int(tenth)], 1.0, atol=0.005), ratios
    assert np.allclose(ratios[int(tenth) + 1 :], 1.1, atol=0.005), ratios


def test_tenths_without_steps_in_common_have_no_ratio() -> None:
    steps = [Step(float(number), 64 if number < 50 else 128, 64 if number < 50 else 128, 0.5) for number in range(100)]
    ratios = step_ratios(steps)
    assert ratios[1] == 1.0 and math.isnan(ratios[8])


def test_steps_of_a_few_rows_more_are_of_another_kind() -> None:
    """They may be padded to a larger graph, which takes a step up."""
    times = np.cumsum([0.016 if number < 500 else 0.0155 for number in range(1000)])
    steps = [Step(now, rows, rows, 0.9) for number, now in enumerate(times) for rows in [1003 if number < 500 else 992]]
    ratios = step_ratios(steps)
    assert ratios[1] == 1.0 and math.isnan(ratios[8]), ratios
