"""SwiGLU on a GPU: a program computes a stretch of one row.

The equation, the dtype policy and the reference are in swiglu.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import cdiv, next_power_of_2

_BLOCK = 1024


@triton.jit
def _swiglu_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up_ptr + row * ROW_STRIDE + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * ROW_STRIDE + WIDTH + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded twice, as two torch operations would.
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * WIDTH + column, (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def launch_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As `swiglu.swiglu`."""
    width = gate_up.shape[-1] // 2
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, 2 * width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if rows.shape[0]:
        block = min(_BLOCK, next_power_of_2(width))
        grid = (rows.shape[0], cdiv(width, block))
        _swiglu_kernel[grid](rows, out, ROW_STRIDE=rows.stride(0), WIDTH=width, BLOCK=block, num_warps=4)
    return out
