"""The k largest values, of equal ones the first, however many rows there are."""

from __future__ import annotations

import pytest
import torch

from raydata_llm.kernels import invariant_topk as module
from raydata_llm.kernels.invariant_topk import invariant_topk, invariant_topk_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [0, 1, 5, 97])
def test_equal_values_come_in_the_order_of_their_places(
    k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEYS_AT_ONCE", 300)
    values = (torch.randn((8, 97), generator=torch.Generator().manual_seed(0)) * 2).round().to(dtype)
    values[0, 3:9] = float("-inf")
    values[1, 5], values[1, 6] = -0.0, 0.0
    expected, places = invariant_topk_ref(values, k)
    found = invariant_topk(values, k)
    assert torch.equal(found[0], expected) and torch.equal(found[1], places)
    alone = invariant_topk(values[2:3], k)
    assert torch.equal(alone[0], found[0][2:3]) and torch.equal(alone[1], found[1][2:3])


def test_no_rows() -> None:
    values, places = invariant_topk(torch.zeros((0, 7)), 3)
    assert values.shape == places.shape == (0, 3)
