"""The linear layer of fixed tiles on a GPU.

The equation, the promise and the reference are in invariant_linear.py; imported only where the tensors are on a GPU.
Programs go through the output in bands of some tiles' rows, column by column, so that those that run at a time share
what they read:

    0 2 4 6 | 8 ...      BAND = 2: the numbers are those of the programs,
    1 3 5 7 | 9 ...      a column of this picture is a column of tiles

Invariant: nothing but the grid, and which rows are there, depends on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels import tuning
from raydata_llm.kernels.integers import cdiv

_BAND = 8
# What Triton takes a pointer to be a multiple of, or else compiles another kernel for.
_ALIGNMENT = 16


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    column_tiles: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    program, row_tiles = tl.program_id(0), tl.cdiv(num_rows, BLOCK_M)
    band = program // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    place = program % (BAND * column_tiles)
    row = (band * BAND + place % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (place // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    is_row, is_column = row < num_rows, column < OUT
    x_at = x_ptr + row[:, None] * WIDTH + step[None, :]
    weight_at = weight_ptr + column[None, :] * WIDTH + step[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        inside = start + step < WIDTH
        x = tl.load(x_at, mask=is_row[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=is_column[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + row[:, None] * OUT + column[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def launch_invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile: tuning.LinearTile | None = None,
) -> torch.Tensor:
    """As `invariant_linear.invariant_linear`.

    Args:
        tile: overrides the choice for the GPU.
    """
    num_rows, width = x.shape
    out = weight.shape[0]
    assert weight.shape == (out, width) and weight.is_contiguous(), (x.shape, weight.shape)
    assert x.dtype == weight.dtype and (bias is None or bias.shape == (out,)), (x.dtype, weight.dtype)
    y = torch.empty((num_rows, out), dtype=x.dtype, device=x.device)
    if not num_rows:
        return y
    tile = tile or tuning.tuning_of(x.device).linear_tile(out, x.dtype)
    _linear_kernel[(cdiv(num_rows, tile.block_m) * cdiv(out, tile.block_n),)](
        aligned(x.contiguous()),
        weight,
        bias,
        y,
        num_rows,
        WIDTH=width,
        OUT=out,
        HAS_BIAS=bias is not None,
        BAND=_BAND,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it begins at an address that another kernel would be compiled for."""
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
