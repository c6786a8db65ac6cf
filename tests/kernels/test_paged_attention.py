"""Paged attention against its reference, over poisoned memory."""

from __future__ import annotations

import pytest
import torch

from raydata_llm.kernels.paged_attention import (
    paged_attention_ref,
    paged_decode_attention,
    paged_prefill_attention,
)

NAN = float("nan")
SHAPES = [(6, 2, 24, 4), (1, 1, 64, 16), (9, 3, 80, 5), (8, 1, 16, 3)]
WINDOWS = [None, 1, 7, 1000]


def make_cache(
    lengths: list[int], kv_heads: int, head_dim: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches in which only the rows' own tokens are numbers; all else, and the unused table columns, is poison."""
    generator = torch.Generator().manual_seed(0)
    columns = -(-max(lengths) // block_size)
    num_blocks = len(lengths) * columns + 2
    order = torch.randperm(num_blocks - 1, generator=generator) + 1
    table = torch.zeros((len(lengths), columns), dtype=torch.int32)
    caches = [torch.full((num_blocks, kv_heads, block_size, head_dim), NAN) for _ in range(2)]
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        table[row, :used] = order[row * columns : row * columns + used]
        for position in range(length):
            for cache in caches:
                block = int(table[row, position // block_size])
                cache[block, :, position % block_size] = torch.randn((kv_heads, head_dim), generator=generator)
    return caches[0], caches[1], table


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_decode_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None
) -> None:
    lengths = [1, 30, 2, 16, 17, 5, *range(40, 58)]
    k_cache, v_cache, table = make_cache(lengths, kv_heads, head_dim, block_size)
    q = torch.randn((len(lengths), heads, head_dim), generator=torch.Generator().manual_seed(1))
    context = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    expected = paged_attention_ref(q, k_cache, v_cache, table, context, starts, 0.2, window)
    result = paged_decode_attention(q, k_cache, v_cache, table, context, 0.2, window)
    assert expected.isfinite().all()
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_prefill_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None
) -> None:
    # (context, queries): a fresh prompt, a chunk after cached tokens, one last token, a prompt of one.
    rows = [(19, 19), (23, 6), (40, 1), (1, 1), (16, 16)]
    lengths = [length for length, _ in rows]
    k_cache, v_cache, table = make_cache(lengths, kv_heads, head_dim, block_size)
    starts = torch.tensor([0, *torch.tensor([count for _, count in rows]).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn((int(starts[-1]), heads, head_dim), generator=torch.Generator().manual_seed(1))
    context = torch.tensor(lengths, dtype=torch.int32)
    expected = paged_attention_ref(q, k_cache, v_cache, table, context, starts, 0.2, window)
    result = paged_prefill_attention(q, k_cache, v_cache, table, context, starts, 0.2, window)
    assert expected.isfinite().all()
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


def test_reference_equals_plain_attention() -> None:
    """The reference itself, on one row without paging, against torch."""
    k_cache, v_cache, table = make_cache([12], 1, 8, 12)
    q = torch.randn((12, 2, 8), generator=torch.Generator().manual_seed(2))
    context, starts = torch.tensor([12]), torch.tensor([0, 12])
    result = paged_attention_ref(q, k_cache, v_cache, table, context, starts, 8**-0.5)
    block = int(table[0, 0])
    k, v = (cache[block].expand(2, -1, -1) for cache in (k_cache, v_cache))
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
    torch.testing.assert_close(result, expected.transpose(0, 1))
