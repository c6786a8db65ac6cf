"""The linear layer's two ways."""

from __future__ import annotations

import pytest
import torch

from raydata_llm.kernels.linear import linear, linear_ref


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [1, 17, 256, 257])
def test_few_and_many_rows_give_the_reference(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, offset = (torch.randn(shape, generator=generator) for shape in ((rows, 40), (33, 40), (33,)))
    arguments = (x, weight, offset if bias else None)
    result = linear(*arguments)
    assert result.is_contiguous()
    torch.testing.assert_close(result, linear_ref(*arguments), atol=1e-5, rtol=1e-5)
