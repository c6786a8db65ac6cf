"""LoRA: low-rank additions to a linear layer, another one for each row.

    y[t] += B[s] (A[s] x[t])                 for each row t whose adapter is in slot s
    y[t]  = gain[s] * y[t] + shift[s]        after that, where the slot's adapter is affine (DoRA's, or has biases)

A linear that is several side by side (q, k and v; gate and up) has a part for each: its A is the parts' one below the
other, and an output column of part p sees the p-th R of the products alone.

dtype policy: x's dtype, gain and shift in float32; both products are summed in float32, the inner one is rounded to x's
dtype, the sum with y once. Shapes: x [T, in], y [T, out], A [slots, parts * R, in], B [slots, out, R], gain and shift
[slots, out]; R is the largest rank, smaller ones are padded with zeros. An adapter's scale is in its B.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

# Rows of a tile, so of a program on a GPU.
TILE_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class AdapterTiles:
    """The rows of a step that have an adapter, those of one adapter together, in tiles.

    Args:
        rows: [M] int32; such rows, by slot.
        slots: [tiles] int32; the adapter of a tile, -1 for a tile that is not there.
        starts, ends: [tiles] int32; a tile's rows are `rows[start:end]`, TILE_ROWS at most.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class Affine:
    """What is done to a linear's output after the addition.

    Args:
        gain, shift: [slots, out] float32; of slots that are not affine they are not read.
        slots: [slots] int32; 1 for those that are affine.
    """

    gain: torch.Tensor
    shift: torch.Tensor
    slots: torch.Tensor


def add_lora_ref(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    affine: Affine,
    tiles: AdapterTiles,
    parts: tuple[int, ...],
) -> None:
    """The equation, tile by tile; see `add_lora`."""
    rank = b.shape[2]
    columns = list(pairwise(accumulate(parts, initial=0)))
    places = zip(tiles.slots.tolist(), tiles.starts.tolist(), tiles.ends.tolist(), strict=True)
    for slot, start, end in places:
        if slot < 0:
            continue
        rows = tiles.rows[start:end]
        inner = (x[rows].float() @ a[slot].float().t()).to(x.dtype).float()
        for part, (first, last) in enumerate(columns):
            delta = inner[:, part * rank : (part + 1) * rank] @ b[slot, first:last].float().t()
            total = y[rows, first:last].float() + delta
            if affine.slots[slot]:
                total = total * affine.gain[slot, first:last] + affine.shift[slot, first:last]
            y[rows, first:last] = total.to(y.dtype)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    affine: Affine,
    tiles: AdapterTiles,
    parts: tuple[int, ...],
) -> None:
    """Add the rows' adapters to a linear's output, in place.

    Args:
        y: [T, out] the linear's output.
        x: [T, in] its input.
        a: [slots, parts * R, in].
        b: [slots, out, R].
        affine: Gains and shifts of the slots.
        tiles: Which rows have which adapter.
        parts: Output columns of each part; they sum to out.
    """
    if not x.is_cuda:
        add_lora_ref(y, x, a, b, affine, tiles, parts)
        return
    from raydata_llm.kernels.lora_triton import launch_add_lora

    launch_add_lora(y, x, a, b, affine, tiles, parts)
