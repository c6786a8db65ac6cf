"""Packed attention equals the equation, for any mix of lengths."""

from __future__ import annotations

import itertools

import pytest
import torch

from raydata_llm.kernels.varlen_attention import varlen_attention, varlen_attention_ref

LENGTHS = {
    "one row": (5,),
    "one token": (1,),
    "equal": (7, 7, 7),
    "sorted": (40, 33, 32, 17, 5, 5, 1),
    "unsorted": (3, 90, 1, 2, 64, 64, 7),
    "many of a length": (4,) * 150 + (3,) * 20,
}


def packed(lengths: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[int]]:
    starts = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator().manual_seed(3)
    # As an encoder hands them over: views of one tensor with q, k and v side by side.
    qkv = torch.randn(starts[-1], 3, 3, 24, generator=generator).to(device, dtype)
    return list(qkv.unbind(1)), starts


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_rows_attend_to_themselves(name: str) -> None:
    (q, k, v), starts = packed(LENGTHS[name], "cpu", torch.float32)
    got = varlen_attention(q, k, v, starts, 0.3)
    torch.testing.assert_close(got, varlen_attention_ref(q, k, v, starts, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_rows_attend_to_themselves_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    (q, k, v), starts = packed(LENGTHS[name], "cuda", dtype)
    got = varlen_attention(q, k, v, starts, 0.3)
    wanted = varlen_attention_ref(q.float(), k.float(), v.float(), starts, 0.3)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), wanted, atol=tolerance, rtol=tolerance)
