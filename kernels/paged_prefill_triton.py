"""Paged prefill attention on a GPU: chunks of queries of mixed lengths, over cached prefixes, in one launch.

The equation, dtype policy and reference are in paged_attention.py; imported only where the tensors are on a GPU.
A program takes a tile of a row's queries with all the G heads that share a KV head, token by token:

    tile row m = query m / G, head m % G of the group        BLOCK_M / G queries a tile

Short chunks then still fill a tile, keys are read once for the group, and less of the causal diagonal is wasted.
Row r has the tile numbers from query_starts[r] / (queries a tile) + r on: more numbers than tiles, never fewer, so that
the grid depends on shapes alone and a program finds its row on the device; one without a tile ends at once.

The shared part of decode attention is the same work: a group's rows are the queries of one "row", all of which see all
of the keys that they share (SHARED below); it leaves float32 and log2 of the softmax's sum, to be gone on with.

Invariant: keys past a tile's last query are never loaded. Tokens past query_starts[R] (padding) are not written.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from raydata_llm.kernels import tuning
from raydata_llm.kernels.integers import next_power_of_2
from raydata_llm.kernels.paged_attention import SharedPrefixes
from raydata_llm.kernels.paged_keys_triton import key_rows, tile_blocks

_MIN_DOT_ROWS = 16
# Rows looked at in one step of the search for a tile's row.
_SEARCH: tl.constexpr = tl.constexpr(256)


@triton.jit
def _row_of(tile: tl.tensor, starts_ptr: tl.tensor, num_rows: tl.tensor, TILE_QUERIES: tl.constexpr) -> tl.tensor:
    """The last row whose tiles begin at `tile` or before."""
    row = -1
    for base in range(0, num_rows, _SEARCH):
        candidate = base + tl.arange(0, _SEARCH)
        start = tl.load(starts_ptr + candidate, mask=candidate < num_rows, other=0)
        begun = (start // TILE_QUERIES + candidate <= tile) & (candidate < num_rows)
        row += tl.sum(begun.to(tl.int32), axis=0)
    return row


@triton.jit
def _attend(
    q: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    places: tl.tensor,
    in_head: tl.tensor,
    key: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take one tile of keys into the running softmax: its peak, its total and the weighted values."""
    readable = in_head[None, :] & (key < end)[:, None] if MASKED else in_head[None, :]
    k = tl.load(k_cache_ptr + places, mask=readable, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    # Below a window's first keys nothing is visible yet, and -inf - -inf is no number.
    level = tl.where(new_peak > float("-inf"), new_peak, 0.0) if WINDOW > 0 else new_peak
    weights = tl.exp2(scores * scale - level[:, None])
    shrink = tl.exp2(peak - level)
    total = total * shrink + tl.sum(weights, axis=1)
    v = tl.load(v_cache_ptr + places, mask=readable, other=0.0)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return new_peak, total, out


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def _prefill_kernel(
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    Q_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    INDIRECT: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    TILE_QUERIES: tl.constexpr = BLOCK_M // GROUP
    # A row's last tiles see most keys: they start first.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    row = _row_of(tile, starts_ptr, num_rows, TILE_QUERIES)
    chunk_start, chunk_end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    first = (tile - chunk_start // TILE_QUERIES - row) * TILE_QUERIES
    count = chunk_end - chunk_start
    if first >= count:
        return

    dim, member = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    in_head = dim < HEAD_DIM
    query = first + member // GROUP
    in_tile = (member < TILE_QUERIES * GROUP) & (query < count)
    token = (chunk_start + query).to(tl.int64)
    head = kv_head * GROUP + member % GROUP
    inside = in_tile[:, None] & in_head[None, :]
    q_at = q_ptr + (token * Q_STRIDE + head * HEAD_DIM)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)

    length = tl.load(lens_ptr + row)
    if SHARED:
        position = length - 1 + 0 * query
        end, seen_by_all = length, length // BLOCK_N * BLOCK_N
    else:
        cached = length - count
        position = cached + query
        end = cached + tl.minimum(first + TILE_QUERIES, count)
        seen_by_all = (cached + first + 1) // BLOCK_N * BLOCK_N
    begin = tl.maximum(length - count + first + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N if WINDOW > 0 else 0
    table_row = tl.load(table_rows_ptr + row) if INDIRECT else row
    table_ptr += table_row.to(tl.int64) * table_stride
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SPLIT_MASK and WINDOW == 0:
        blocks = tile_blocks(table_ptr, 0, seen_by_all, BLOCK_SIZE, BLOCK_N)
        for start in range(0, seen_by_all, BLOCK_N):
            rows = key_rows(blocks, start, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N)
            blocks = tile_blocks(table_ptr, start + BLOCK_N, seen_by_all, BLOCK_SIZE, BLOCK_N)
            places = rows[:, None] * HEAD_DIM + dim[None, :]
            key = start + tl.arange(0, BLOCK_N)
            peak, total, out = _attend(
                q, peak, total, out, k_cache_ptr, v_cache_ptr, places, in_head, key, end, position, scale, WINDOW, False
            )
        begin = seen_by_all
    blocks = tile_blocks(table_ptr, begin, end, BLOCK_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        rows = key_rows(blocks, start, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N)
        blocks = tile_blocks(table_ptr, start + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        places = rows[:, None] * HEAD_DIM + dim[None, :]
        key = start + tl.arange(0, BLOCK_N)
        peak, total, out = _attend(
            q, peak, total, out, k_cache_ptr, v_cache_ptr, places, in_head, key, end, position, scale, WINDOW, True
        )

    place = token * KV_HEADS * GROUP + head
    if SHARED:
        tl.store(lse_ptr + place, peak + tl.log2(total), mask=in_tile)
    out_at = out_ptr + (place * HEAD_DIM)[:, None] + dim[None, :]
    tl.store(out_at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def launch_paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    longest: int | None = None,
    out: torch.Tensor | None = None,
    tile: tuning.Tile | None = None,
) -> torch.Tensor:
    """As `paged_attention.paged_prefill_attention`.

    Args:
        tile: overrides the choice for the GPU.
    """
    assert table_rows is not None or len(block_table) == len(context_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous() and out.shape == q.shape
    tile = tile or _chosen_tile(q, longest)
    _launch(q, k_cache, v_cache, block_table, table_rows, context_lens, query_starts, scale, window, out, None, tile)
    return out


def launch_shared_prefix_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    shared: SharedPrefixes,
    scale: float,
    *,
    tile: tuning.Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each group's rows to the keys that the group shares; rows in no group are left as they come.

    Args:
        q: [R, H, D], a query a row.

    Returns:
        The attention [R, H, D] and log2 of its softmax's sum [R, H], both float32.
    """
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    rows, lens, starts = shared.table_rows, shared.lens, shared.starts
    tile = tile or _chosen_tile(q, None)
    _launch(q, k_cache, v_cache, block_table, rows, lens, starts, scale, None, out, lse, tile)
    return out, lse


def _head_block(head_dim: int) -> int:
    return int(max(_MIN_DOT_ROWS, next_power_of_2(head_dim)))


def _chosen_tile(q: torch.Tensor, longest: int | None) -> tuning.Tile:
    return tuning.tuning_of(q.device).prefill_tile(_head_block(q.shape[2]), q.dtype, longest)


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    table_rows: torch.Tensor | None,
    lens: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tile: tuning.Tile,
) -> None:
    """Fill `out`, and `lse` where the rows are groups with shared keys."""
    num_tokens, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    assert q.stride(2) == 1 and q.stride(1) == head_dim and heads % kv_heads == 0, (q.shape, q.stride())
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.shape == v_cache.shape
    num_rows, group = len(lens), heads // kv_heads
    assert block_table.stride(1) == 1 and len(starts) == num_rows + 1
    assert table_rows is None or len(table_rows) == num_rows
    if not num_tokens:
        return
    block_m = max(tile.block_m, next_power_of_2(group))
    num_tiles = num_tokens // (block_m // group) + num_rows
    _prefill_kernel[(num_tiles * kv_heads,)](
        q,
        k_cache,
        v_cache,
        block_table,
        table_rows,
        lens,
        starts,
        out,
        lse,
        scale * math.log2(math.e),
        num_rows,
        block_table.stride(0),
        Q_STRIDE=q.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        INDIRECT=table_rows is not None,
        SHARED=lse is not None,
        SPLIT_MASK=tile.split_mask,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=_head_block(head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
