"""Which numbers of rows decode graphs are captured for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydata_llm.engine.decode_buckets import (
    candidate_sizes,
    fixed_buckets,
    linear_seconds,
    worthwhile_sizes,
)
from raydata_llm.engine.decoder import Linear


@pytest.mark.parametrize("most", [1, 3, 64, 300, 1024, 5000])
def test_fixed_buckets_waste_little(most: int) -> None:
    buckets = fixed_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[-1] == most and len(buckets) < 70
    for rows in range(1, most + 1):
        bucket = next(bucket for bucket in buckets if bucket >= rows)
        assert bucket - rows < max(64, rows / 8) and bucket < 2 * rows + 1


@pytest.mark.parametrize("most", [1, 16, 17, 1000, 1024, 8192])
def test_measured_sizes_are_few_and_close(most: int) -> None:
    sizes = candidate_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) < 140
    assert all(after - before <= max(32, after / 16) for before, after in itertools.pairwise(sizes))


def test_a_size_that_is_slower_than_a_larger_one_gets_no_graph() -> None:
    # Milliseconds of an 8b model's linears on an H100.
    measured = {384: 8.48, 416: 10.11, 448: 14.09, 480: 9.81, 512: 9.68, 544: 11.72, 640: 12.51, 672: 15.83, 800: 15.73}
    assert worthwhile_sizes(list(measured), list(measured.values())) == [384, 512, 544, 640, 800]


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=40))
def test_no_step_is_padded_to_a_size_much_slower_than_another_that_holds_it(seconds: list[float]) -> None:
    sizes = list(range(1, len(seconds) + 1))
    chosen = worthwhile_sizes(sizes, seconds)
    assert chosen == sorted(chosen) and chosen[-1] == sizes[-1]
    for rows in sizes:
        taken = next(size for size in chosen if size >= rows)
        assert seconds[taken - 1] * 0.97 <= min(seconds[rows - 1 :])


@pytest.mark.gpu
def test_linears_are_measured_at_each_size() -> None:
    weight = torch.randn((4096, 4096), dtype=torch.bfloat16, device="cuda")
    small, large = linear_seconds([Linear(weight)] * 8, [64, 8192]).tolist()
    assert 0 < small < large
    # Again: what was captured before is gone.
    assert (linear_seconds([Linear(weight)], [16, 32, 64]) > 0).all()
