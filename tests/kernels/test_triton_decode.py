"""The Triton kernel of paged decode attention, against its reference, over poisoned memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raydata_llm.kernels.paged_attention import SharedPrefixes, paged_attention_ref
from raydata_llm.kernels.tuning import Tile
from tests.kernels.pairs import pairs

Close = Callable[..., None]
MakeRows = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
SMALL = Tile(block_n=16, num_warps=2, num_stages=2)


def expected_of(
    q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor, torch.Tensor], lengths: list[int], window: int | None
) -> torch.Tensor:
    starts = torch.arange(len(lengths) + 1)
    k, v, table = (tensor.cpu() for tensor in caches)
    used = torch.where(table == 2**31 - 1, 0, table)
    return paged_attention_ref(q.cpu().float(), k.float(), v.float(), used, torch.tensor(lengths), starts, 0.2, window)


SHAPES = [(6, 2, 24, 4), (1, 1, 64, 16), (9, 3, 80, 5), (8, 1, 16, 32), (4, 2, 96, 64)]
SETTINGS = [(None, 1), (None, 3), (1, 1), (7, 3), (20, 1), (1000, 3)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "window", "num_splits"), pairs(SHAPES, SETTINGS), ids=str
)
def test_decode_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    num_splits: int,
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    make_rows: MakeRows,
    close: Close,
) -> None:
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    lengths = [1, 30, 16, 17, 53]
    caches = make_rows(lengths, kv_heads, head_dim, block_size, triton_dtype)
    q = torch.randn((len(lengths), heads, head_dim), generator=torch.Generator().manual_seed(1))
    q = q.to(triton_device, triton_dtype)
    context = torch.tensor(lengths, dtype=torch.int32, device=triton_device)
    result = launch_paged_decode_attention(q, *caches, context, 0.2, window, tile=SMALL, num_splits=num_splits)
    close(result, expected_of(q, caches, lengths, window))


def test_a_group_of_more_heads_than_a_dot_product_has_rows(
    triton_device: torch.device, make_rows: MakeRows, close: Close
) -> None:
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    caches = make_rows([19, 3], 1, 16, 16, torch.float16)
    q = torch.randn((2, 23, 16), generator=torch.Generator().manual_seed(1)).to(triton_device, torch.float16)
    context = torch.tensor([19, 3], dtype=torch.int32, device=triton_device)
    close(launch_paged_decode_attention(q, *caches, context, 0.2), expected_of(q, caches, [19, 3], None))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_padding_row_of_no_length_gives_zeros(
    num_splits: int, triton_device: torch.device, make_rows: MakeRows
) -> None:
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    caches = make_rows([5, 5], 1, 16, 16, torch.float16)
    q = torch.ones((2, 2, 16), device=triton_device, dtype=torch.float16)
    context = torch.tensor([0, 5], dtype=torch.int32, device=triton_device)
    result = launch_paged_decode_attention(q, *caches, context, 0.2, tile=SMALL, num_splits=num_splits)
    assert torch.equal(result[0], torch.zeros_like(result[0])) and result[1].isfinite().all()


def test_rows_of_a_wider_block_table(triton_device: torch.device, make_rows: MakeRows, close: Close) -> None:
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    k_cache, v_cache, table = make_rows([40, 21], 2, 16, 8, torch.float32)
    wide = torch.full((2, 11), 2**31 - 1, dtype=torch.int32, device=triton_device)
    wide[:, : table.shape[1]] = table
    q = torch.randn((2, 6, 16), generator=torch.Generator().manual_seed(1)).to(triton_device)
    context = torch.tensor([40, 21], dtype=torch.int32, device=triton_device)
    result = launch_paged_decode_attention(q, k_cache, v_cache, wide, context, 0.2, tile=SMALL)
    close(result, expected_of(q, (k_cache, v_cache, table), [40, 21], None))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(6, 2, 24, 16), (4, 1, 64, 4), (2, 2, 80, 32)], ids=str
)
def test_groups_of_rows_read_what_they_share_once(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    num_splits: int,
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    make_rows: MakeRows,
    close: Close,
) -> None:
    """Two groups and a row in none; slots in an order of their own; members' own entries of the prefix out of range."""
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    lengths = [3 * block_size + 5, 3 * block_size + 1, 4 * block_size, 2 * block_size, block_size + 7, 9]
    starts, shared_blocks = [0, 3, 5, 5], [3, 1, 0]
    caches = make_rows(lengths, kv_heads, head_dim, block_size, triton_dtype)
    table = caches[2].clone()
    for group, blocks in enumerate(shared_blocks):
        table[starts[group] : starts[group + 1], :blocks] = table[starts[group], :blocks]
    q = torch.randn((len(lengths), heads, head_dim), generator=torch.Generator().manual_seed(1))
    q = q.to(triton_device, triton_dtype)
    expected = expected_of(q, (*caches[:2], table), lengths, None)

    slots = torch.tensor([4, 0, 6, 2, 1, 5], dtype=torch.int32, device=triton_device)
    slot_table = torch.full((7, table.shape[1]), 2**31 - 1, dtype=torch.int32, device=triton_device)
    slot_table[slots.long()] = table
    for group, blocks in enumerate(shared_blocks):
        slot_table[slots[starts[group] + 1 : starts[group + 1]].long(), :blocks] = 2**31 - 1
    lens = torch.tensor(shared_blocks, dtype=torch.int32, device=triton_device) * block_size
    shared = SharedPrefixes(
        starts=torch.tensor(starts, dtype=torch.int32, device=triton_device),
        lens=lens,
        table_rows=slots[torch.tensor([0, 3, 0])],
        row_lens=lens[torch.tensor([0, 0, 0, 1, 1, 2])].contiguous(),
    )
    context = torch.tensor(lengths, dtype=torch.int32, device=triton_device)
    result = launch_paged_decode_attention(
        q,
        *caches[:2],
        slot_table,
        context,
        0.2,
        table_rows=slots,
        shared=shared,
        tile=SMALL,
        num_splits=num_splits,
    )
    close(result, expected)
