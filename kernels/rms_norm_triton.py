"""RMSNorm on a GPU: one program a row, the residual addition in the same pass.

The equation, the dtype policy and the reference are in rms_norm.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import next_power_of_2


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    eps: tl.tensor,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    x = tl.load(x_ptr + row * X_STRIDE + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * RESIDUAL_STRIDE + column, mask=inside, other=0.0)
        # Rounded before it is normalised, as the next layer's residual is what this one saw.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * HIDDEN + column, x, mask=inside)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    out = weight * normed.to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + column, out.to(x.dtype), mask=inside)


def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm.rms_norm`."""
    rows, out = _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(rows, rows, weight, eps, out, out, add=False)
    return out


def launch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm.add_rms_norm`."""
    assert x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(_rows(x), _rows(residual), weight, eps, out, total, add=True)
    return out, total


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor,
    *,
    add: bool,
) -> None:
    rows, hidden = x.shape
    assert weight.shape == (hidden,), (weight.shape, hidden)
    block = next_power_of_2(hidden)
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            total,
            eps,
            X_STRIDE=x.stride(0),
            RESIDUAL_STRIDE=residual.stride(0),
            HIDDEN=hidden,
            ADD=add,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
