"""A linear layer whose rows come out the same, bit for bit, whatever rows stand beside them.

    y = x W^T + b

cuBLAS chooses a kernel by the number of rows: another tile, another instruction, a sum cut among programs. Here every
number of rows is computed in tiles of one size, each output's products are summed by one program from the first to the
last, and the size depends on the weight's shape, the dtype and the kind of GPU alone. So a row's sums are the same
instructions on the same numbers, in the same order, wherever the row stands; rows that are not there are zeros.

dtype policy: as linear.py; the bias is added in float32, and the result rounded once.
Shapes: x [rows, in], weight [out, in], bias [out]; y [rows, out].
"""

from __future__ import annotations

import torch

from raydata_llm.kernels.linear import linear, linear_ref

invariant_linear_ref = linear_ref


def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply a linear layer to x [rows, in]; off a GPU it is `linear`, which promises no bits."""
    if not x.is_cuda:
        return linear(x, weight, bias)
    from raydata_llm.kernels.invariant_linear_triton import launch_invariant_linear

    return launch_invariant_linear(x, weight, bias)
