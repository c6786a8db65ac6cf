"""RMSNorm, SwiGLU, and the fused QKV pass, against their equations."""

from __future__ import annotations

import pytest
import torch

from raydata_llm.kernels.qkv_to_cache import qkv_to_cache
from raydata_llm.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from raydata_llm.kernels.swiglu import swiglu, swiglu_ref

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 24), (7, 5, 96)], ids=str)
def test_rms_norm_equals_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    expected = rms_norm_ref(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_add_rms_norm_returns_the_sum_as_the_next_residual() -> None:
    x, residual, weight = draw(4, 24), draw(4, 24, seed=1), draw(24, seed=2)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, rms_norm_ref(x + residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_swiglu_equals_its_reference(dtype: torch.dtype) -> None:
    gate_up = draw(5, 2 * 33, dtype=dtype)
    expected = swiglu_ref(gate_up.float()).to(dtype)
    torch.testing.assert_close(swiglu(gate_up), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (1, 1, 64), (9, 3, 80)])
def test_qkv_reaches_query_and_cache(heads: int, kv_heads: int, head_dim: int, qk_norm: bool) -> None:
    tokens, block_size = 11, 4
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_dim)
    positions = torch.arange(tokens) * 3
    slots = torch.randperm(6 * block_size, generator=torch.Generator().manual_seed(4))[:tokens]
    angles = torch.outer(torch.arange(40.0), 10.0 ** -torch.arange(head_dim // 2))
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    k_cache, v_cache = (torch.full((6, kv_heads, block_size, head_dim), float("nan")) for _ in range(2))
    q_norm, k_norm = (draw(head_dim, seed=5), draw(head_dim, seed=6)) if qk_norm else (None, None)
    q = qkv_to_cache(qkv, positions, slots, table, k_cache, v_cache, q_norm, k_norm, 1e-6)

    split = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    parts = [part.view(tokens, -1, head_dim) for part in split]
    for index, norm in enumerate((q_norm, k_norm)):
        if norm is not None:
            parts[index] = rms_norm_ref(parts[index], norm, 1e-6)
    torch.testing.assert_close(q, rotate_pairs(parts[0], angles[positions]))
    written = [cache[slots // block_size, :, slots % block_size] for cache in (k_cache, v_cache)]
    torch.testing.assert_close(written[0], rotate_pairs(parts[1], angles[positions]))
    torch.testing.assert_close(written[1], parts[2])
    assert k_cache.isnan().sum() == (6 * block_size - tokens) * kv_heads * head_dim, "no other place is written"


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotation as complex numbers: an independent way to the same."""
    half = x.shape[-1] // 2
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([rotated.real, rotated.imag], dim=-1)
