"""SwiGLU: the gated activation between the two linears of an MLP.

    out = silu(gate) * up,  silu(g) = g * sigmoid(g)

dtype policy: x's dtype throughout, as Hugging Face's models do.
Shapes: gate_up [..., 2 * intermediate], gate first; out [..., intermediate].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """The equation."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Activation of a fused gate-and-up projection."""
    if gate_up.is_cuda:
        from raydata_llm.kernels.swiglu_triton import launch_swiglu

        return launch_swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
