"""Paged decode attention on a GPU: one program a row and KV head, so that keys and values are read once for all the
query heads that share them.

The equation, dtype policy and reference are in paged_attention.py; imported only where the tensors are on a GPU.
Where rows are too few to fill the chip, a row's keys are split among programs and their parts merged:

    out = sum_s 2^(lse_s - max lse) out_s / sum_s 2^(lse_s - max lse)      lse_s = log2 sum of 2^(score_j) in split s

Where groups of rows share their first keys, the groups' part is computed first (paged_prefill_triton.py: a dense
product a group), and a row's program begins from it as from a running softmax that has seen those keys already.

Invariant: the grid depends on shapes alone and lengths are read on the device, so launches can be captured in a graph.
Keys past a row's end, and those its group has seen, are never loaded; a row of length 0 (padding) gives zeros. Programs
start in row order: long rows first fill the chip best.
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
from raydata_llm.kernels.paged_prefill_triton import launch_shared_prefix_attention

_MAX_SPLITS = 32
# A tensor core product has no fewer rows.
_MIN_DOT_ROWS = 16


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _decode_kernel(
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    shared_lens_ptr: tl.tensor,
    shared_out_ptr: tl.tensor,
    shared_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    Q_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    INDIRECT: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    length = tl.load(lens_ptr + row)
    first_key = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    if SHARED:
        first_key = tl.load(shared_lens_ptr + row)
    first_tile, last_tile = first_key // BLOCK_N, tl.cdiv(length, BLOCK_N)
    if SPLIT:
        tiles = tl.cdiv(last_tile - first_tile, num_splits)
        first_tile += tl.program_id(1) * tiles
        last_tile = tl.minimum(first_tile + tiles, last_tile)

    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    key = tl.arange(0, BLOCK_N)
    in_group, in_head = member < GROUP, dim < HEAD_DIM
    head = kv_head * GROUP + member
    q_at = q_ptr + row * Q_STRIDE + head[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_at, mask=in_group[:, None] & in_head[None, :], other=0.0)
    table_row = tl.load(table_rows_ptr + row).to(tl.int64) if INDIRECT else row
    table_ptr += table_row * table_stride

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    # Summed over a tile's keys only at the end: a sum crosses warps.
    totals = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if SHARED:
        begun = in_group & (first_key > 0) & (tl.program_id(1) == 0)
        at = row * KV_HEADS * GROUP + head
        peak = tl.load(shared_lse_ptr + at, mask=begun, other=float("-inf"))
        totals += tl.where(begun[:, None] & (key == 0)[None, :], 1.0, 0.0)
        shared_at = shared_out_ptr + at[:, None] * HEAD_DIM + dim[None, :]
        out = tl.load(shared_at, mask=begun[:, None] & in_head[None, :], other=0.0)
    blocks = tile_blocks(table_ptr, first_tile * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
    for start in range(first_tile * BLOCK_N, last_tile * BLOCK_N, BLOCK_N):
        rows = key_rows(blocks, start, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N)
        blocks = tile_blocks(table_ptr, start + BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
        places = rows[:, None] * HEAD_DIM + dim[None, :]
        visible = start + key < length
        if WINDOW > 0 or SHARED:
            visible = visible & (start + key >= first_key)
        readable = visible[:, None] & in_head[None, :]
        k = tl.load(k_cache_ptr + places, mask=readable, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        totals = totals * shrink[:, None] + weights
        v = tl.load(v_cache_ptr + places, mask=readable, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        peak = new_peak

    total = tl.sum(totals, axis=1)
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    place = row * KV_HEADS * GROUP + head
    if SPLIT:
        place = place * num_splits + tl.program_id(1)
        tl.store(lse_ptr + place, peak + tl.log2(total), mask=in_group)
    out_at = out_ptr + place[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_group[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    part_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    lse = tl.load(lse_ptr + head * num_splits + split, mask=split < num_splits, other=float("-inf"))
    peak = tl.max(lse, axis=0)
    weights = tl.where(lse > float("-inf"), tl.exp2(lse - peak), 0.0)
    part_at = part_ptr + (head * num_splits + split)[:, None] * HEAD_DIM + dim[None, :]
    parts = tl.load(part_at, mask=(split < num_splits)[:, None] & in_head[None, :], other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=in_head)


def launch_paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    shared: SharedPrefixes | None = None,
    out: torch.Tensor | None = None,
    tile: tuning.Tile | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """As `paged_attention.paged_decode_attention`.

    Args:
        tile, num_splits: override what is chosen for the GPU and the shape.
    """
    num_rows, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    assert q.stride(2) == 1 and q.stride(1) == head_dim and heads % kv_heads == 0, (q.shape, q.stride())
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.shape == v_cache.shape
    assert block_table.stride(1) == 1 and len(context_lens) == num_rows
    assert len(block_table) == num_rows if table_rows is None else len(table_rows) == num_rows
    assert window is None or shared is None, "a window ends inside the shared keys"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous() and out.shape == q.shape
    if not num_rows:
        return out
    block_d = max(_MIN_DOT_ROWS, next_power_of_2(head_dim))
    choices = tuning.tuning_of(q.device)
    if num_splits is None:
        block_n = (tile or choices.decode_tile(block_d, q.dtype, is_split=True)).block_n
        num_splits = choose_splits(num_rows * kv_heads, block_table.shape[1] * block_size, block_n, q.device)
    tile = tile or choices.decode_tile(block_d, q.dtype, is_split=num_splits > 1)
    shared_out = shared_lse = None
    if shared is not None:
        assert len(shared.row_lens) == num_rows
        shared_out, shared_lse = launch_shared_prefix_attention(q, k_cache, v_cache, block_table, shared, scale)
    parts, lse = out, out
    if num_splits > 1:
        parts = torch.empty((num_rows, heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_rows, heads, num_splits), dtype=torch.float32, device=q.device)
    _decode_kernel[(num_rows * kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        table_rows,
        context_lens,
        None if shared is None else shared.row_lens,
        shared_out,
        shared_lse,
        parts,
        lse,
        scale * math.log2(math.e),
        block_table.stride(0),
        num_splits,
        Q_STRIDE=q.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        INDIRECT=table_rows is not None,
        SHARED=shared is not None,
        SPLIT=num_splits > 1,
        BLOCK_G=max(_MIN_DOT_ROWS, next_power_of_2(heads // kv_heads)),
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _merge_kernel[(num_rows * heads,)](
            parts, lse, out, num_splits, HEAD_DIM=head_dim, BLOCK_SPLITS=_MAX_SPLITS, BLOCK_D=block_d, num_warps=2
        )
    return out


def choose_splits(programs: int, max_keys: int, block_n: int, device: torch.device) -> int:
    """Into how many programs a row's keys go: 1 once the rows alone fill the chip."""
    wanted = tuning.num_sms(device) * tuning.tuning_of(device).programs_per_sm
    # A split of fewer than four tiles is mostly its start and its end.
    useful = max(1, max_keys // (4 * block_n))
    return min(_MAX_SPLITS, useful, max(1, wanted // programs))
