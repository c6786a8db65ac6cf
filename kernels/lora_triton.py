"""LoRA on a GPU: one kernel multiplies tiles of rows by their A, another by their B and adds.

The first cuts the sum over the input among programs, as a decode step has few rows, and writes their parts one beside
the other; the second adds these up in a fixed order, so that a row's result does not depend on timing. The equation,
the dtype policy and the reference are in lora.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import cdiv, next_power_of_2
from raydata_llm.kernels.lora import TILE_ROWS, AdapterTiles, Affine

_BLOCK_IN = 128
_BLOCK_OUT = 128
# Programs over the input of one tile; enough to fill a GPU at 16 tiles.
_MAX_SPLITS = 8


@triton.jit
def _shrink_kernel(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    RANKS_PADDED: tl.constexpr,
    SPLIT_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tile, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + tile)
    if slot < 0:
        return
    member = tl.load(starts_ptr + tile) + tl.arange(0, TILE)
    present = member < tl.load(ends_ptr + tile)
    rows = tl.load(rows_ptr + member, mask=present, other=0).to(tl.int64)
    rank = tl.arange(0, RANKS_PADDED)
    a_rows = a_ptr + slot.to(tl.int64) * RANKS * WIDTH + rank[:, None] * WIDTH
    inner = tl.zeros((TILE, RANKS_PADDED), dtype=tl.float32)
    for begin in range(split * SPLIT_WIDTH, (split + 1) * SPLIT_WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < WIDTH
        x = tl.load(
            x_ptr + rows[:, None] * X_STRIDE + column[None, :], mask=present[:, None] & inside[None, :], other=0.0
        )
        a = tl.load(a_rows + column[None, :], mask=(rank[:, None] < RANKS) & inside[None, :], other=0.0)
        inner = tl.dot(x, tl.trans(a), inner, input_precision="ieee")
    place = (member[:, None].to(tl.int64) * SPLITS + split) * RANKS_PADDED + rank[None, :]
    tl.store(inner_ptr + place, inner, mask=present[:, None])


@triton.jit
def _expand_kernel(
    y_ptr: tl.tensor,
    b_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    Y_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST_END: tl.constexpr,
    SECOND_END: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    RANKS_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    slot = tl.load(slots_ptr + tile)
    if slot < 0:
        return
    member = tl.load(starts_ptr + tile) + tl.arange(0, TILE)
    present = member < tl.load(ends_ptr + tile)
    rows = tl.load(rows_ptr + member, mask=present, other=0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part_of = (column >= FIRST_END).to(tl.int32) + (column >= SECOND_END).to(tl.int32)
    rank = tl.arange(0, RANK_PADDED)
    b_rows = b_ptr + (slot.to(tl.int64) * WIDTH + column[:, None]) * RANK + rank[None, :]
    delta = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        wanted = (column < WIDTH) & (part_of == part)
        # Mostly a block's columns are all of one part.
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            inner = tl.zeros((TILE, RANK_PADDED), dtype=tl.float32)
            for split in range(SPLITS):
                place = (member[:, None].to(tl.int64) * SPLITS + split) * RANKS_PADDED + part * RANK + rank[None, :]
                inner += tl.load(inner_ptr + place, mask=present[:, None] & (rank[None, :] < RANK), other=0.0)
            b = tl.load(b_rows, mask=wanted[:, None] & (rank[None, :] < RANK), other=0.0)
            delta = tl.dot(inner.to(b.dtype), tl.trans(b), delta, input_precision="ieee")
    y_at = y_ptr + rows[:, None] * Y_STRIDE + column[None, :]
    mask = present[:, None] & (column[None, :] < WIDTH)
    y = tl.load(y_at, mask=mask, other=0.0)
    total = y.to(tl.float32) + delta
    if tl.load(affine_ptr + slot) != 0:
        of_column = slot.to(tl.int64) * WIDTH + column
        gain = tl.load(gain_ptr + of_column, mask=column < WIDTH, other=0.0)
        shift = tl.load(shift_ptr + of_column, mask=column < WIDTH, other=0.0)
        total = total * gain[None, :] + shift[None, :]
    tl.store(y_at, total.to(y.dtype), mask=mask)


def launch_add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    affine: Affine,
    tiles: AdapterTiles,
    parts: tuple[int, ...],
) -> None:
    """As `lora.add_lora`; grids depend on the number of tiles alone."""
    num_tiles, ranks, width = len(tiles.slots), a.shape[1], x.shape[1]
    if not num_tiles:
        return
    splits = min(_MAX_SPLITS, cdiv(width, _BLOCK_IN))
    split_width = cdiv(cdiv(width, splits), _BLOCK_IN) * _BLOCK_IN
    ranks_padded = max(16, next_power_of_2(ranks))
    inner = torch.empty((len(tiles.rows), splits, ranks_padded), dtype=torch.float32, device=x.device)
    ends = (*parts, 0, 0)
    where = (tiles.rows, tiles.slots, tiles.starts, tiles.ends)
    _shrink_kernel[(num_tiles, splits)](
        x,
        a,
        *where,
        inner,
        X_STRIDE=x.stride(0),
        WIDTH=width,
        RANKS=ranks,
        RANKS_PADDED=ranks_padded,
        SPLIT_WIDTH=split_width,
        SPLITS=splits,
        TILE=TILE_ROWS,
        BLOCK=_BLOCK_IN,
        num_warps=4,
        num_stages=3,
    )
    _expand_kernel[(num_tiles, cdiv(y.shape[1], _BLOCK_OUT))](
        y,
        b,
        affine.gain,
        affine.shift,
        affine.slots,
        inner,
        *where,
        Y_STRIDE=y.stride(0),
        WIDTH=y.shape[1],
        FIRST_END=ends[0] if len(parts) > 1 else y.shape[1],
        SECOND_END=ends[0] + ends[1] if len(parts) > 2 else y.shape[1],
        PARTS=len(parts),
        RANK=b.shape[2],
        RANK_PADDED=max(16, next_power_of_2(b.shape[2])),
        RANKS_PADDED=ranks_padded,
        SPLITS=splits,
        TILE=TILE_ROWS,
        BLOCK=_BLOCK_OUT,
        num_warps=4,
        num_stages=2,
    )
