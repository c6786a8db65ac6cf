"""RMSNorm, with the residual addition that comes before it.

    residual' = x + residual
    out = residual' / sqrt(mean(residual'^2) + eps) * weight

dtype policy: the mean is taken in float32, the product with the weight in x's dtype, as Hugging Face's models do.
Shapes: x and residual [..., hidden], weight [hidden].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The equation, without the residual."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    if x.is_cuda:
        from raydata_llm.kernels.rms_norm_triton import launch_rms_norm

        return launch_rms_norm(x, weight, eps)
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `residual` to `x` and normalise; returns (normalised, the sum)."""
    if x.is_cuda:
        from raydata_llm.kernels.rms_norm_triton import launch_add_rms_norm

        return launch_add_rms_norm(x, residual, weight, eps)
    residual = x + residual
    return rms_norm(residual, weight, eps), residual
