"""The Triton kernel of paged prefill attention, against its reference, over poisoned memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raydata_llm.kernels.paged_attention import paged_attention_ref
from raydata_llm.kernels.tuning import Tile
from tests.kernels.pairs import pairs

Close = Callable[..., None]
MakeRows = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
# Keys in context, queries: a chunk after cached tokens, a prompt, one last token, a prompt of one, nothing at all.
ROWS = [(35, 18), (21, 21), (40, 1), (1, 1), (5, 0), (16, 16)]
PLAIN = Tile(block_m=16, block_n=16, num_warps=4, num_stages=2)
SPLIT = Tile(block_m=16, block_n=16, num_warps=4, num_stages=2, split_mask=True)


SHAPES = [(6, 2, 24, 4), (1, 1, 64, 16), (9, 3, 80, 5), (23, 1, 16, 32), (4, 2, 96, 64)]
SETTINGS = [(None, PLAIN), (None, SPLIT), (1, PLAIN), (7, SPLIT), (20, PLAIN), (1000, PLAIN)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "window", "tile"), pairs(SHAPES, SETTINGS), ids=str
)
def test_prefill_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    tile: Tile,
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    make_rows: MakeRows,
    close: Close,
) -> None:
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    lengths = [length for length, _ in ROWS]
    k_cache, v_cache, table = make_rows(lengths, kv_heads, head_dim, block_size, triton_dtype)
    starts = torch.tensor([0, *torch.tensor([count for _, count in ROWS]).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn((int(starts[-1]), heads, head_dim), generator=torch.Generator().manual_seed(1)).to(triton_dtype)
    context = torch.tensor(lengths, dtype=torch.int32)
    host = (k_cache.cpu().float(), v_cache.cpu().float(), torch.where(table == 2**31 - 1, 0, table).cpu())
    expected = paged_attention_ref(q.float(), *host, context, starts, 0.2, window)
    device = triton_device
    result = launch_paged_prefill_attention(
        q.to(device), k_cache, v_cache, table, context.to(device), starts.to(device), 0.2, window, tile=tile
    )
    close(result, expected)


def test_more_rows_than_one_step_of_the_search(triton_device: torch.device, make_rows: MakeRows, close: Close) -> None:
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    lengths = [2] * 260
    k_cache, v_cache, table = make_rows(lengths, 1, 16, 16, torch.float32)
    counts = torch.tensor([0] * 257 + [1, 2, 1])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    q = torch.randn((4, 2, 16), generator=torch.Generator().manual_seed(1))
    context = torch.tensor(lengths, dtype=torch.int32)
    expected = paged_attention_ref(q, k_cache.cpu(), v_cache.cpu(), table.cpu(), context, starts, 0.2)
    device = triton_device
    result = launch_paged_prefill_attention(
        q.to(device), k_cache, v_cache, table, context.to(device), starts.to(device), 0.2, tile=PLAIN
    )
    close(result, expected)


def test_padding_tokens_stay_unwritten(triton_device: torch.device, make_rows: MakeRows) -> None:
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    k_cache, v_cache, table = make_rows([9, 3], 1, 16, 16, torch.float32)
    starts = torch.tensor([0, 9, 12], dtype=torch.int32, device=triton_device)
    context = torch.tensor([9, 3], dtype=torch.int32, device=triton_device)
    q = torch.ones((40, 2, 16), device=triton_device)
    result = launch_paged_prefill_attention(q, k_cache, v_cache, table, context, starts, 0.2, tile=PLAIN)
    assert result[:12].isfinite().all() and result[12:].isnan().all()
