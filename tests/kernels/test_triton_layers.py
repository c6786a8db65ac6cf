"""The Triton kernels of RMSNorm, SwiGLU and the QKV pass, against their references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raydata_llm.kernels.qkv_to_cache import qkv_to_cache
from raydata_llm.kernels.rms_norm import rms_norm_ref
from raydata_llm.kernels.swiglu import swiglu_ref

Close = Callable[..., None]


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 24), (2, 3, 96), (2, 2048), (2, 5000)], ids=str)
def test_rms_norm(shape: tuple[int, ...], triton_dtype: torch.dtype, triton_device: torch.device, close: Close) -> None:
    from raydata_llm.kernels.rms_norm_triton import launch_rms_norm

    x = draw(*shape, dtype=triton_dtype, device=triton_device)
    weight = draw(shape[-1], dtype=triton_dtype, device=triton_device, seed=1)
    close(launch_rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))


def test_rms_norm_of_every_other_row(triton_device: torch.device, close: Close) -> None:
    from raydata_llm.kernels.rms_norm_triton import launch_rms_norm

    x = draw(6, 24, dtype=torch.float16, device=triton_device)[::2]
    weight = draw(24, dtype=torch.float16, device=triton_device, seed=1)
    close(launch_rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 1), (4, 24), (2, 3, 88)], ids=str)
def test_add_rms_norm(
    shape: tuple[int, ...], triton_dtype: torch.dtype, triton_device: torch.device, close: Close
) -> None:
    from raydata_llm.kernels.rms_norm_triton import launch_add_rms_norm

    x, residual = (draw(*shape, dtype=triton_dtype, device=triton_device, seed=seed) for seed in (0, 1))
    weight = draw(shape[-1], dtype=triton_dtype, device=triton_device, seed=2)
    normed, total = launch_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    close(normed, rms_norm_ref(x + residual, weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 2), (5, 66), (2, 2, 2 * 1500)], ids=str)
def test_swiglu(shape: tuple[int, ...], triton_dtype: torch.dtype, triton_device: torch.device, close: Close) -> None:
    from raydata_llm.kernels.swiglu_triton import launch_swiglu

    gate_up = draw(*shape, dtype=triton_dtype, device=triton_device)
    close(launch_swiglu(gate_up), swiglu_ref(gate_up.float()))


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(6, 2, 24, 4), (1, 1, 64, 16), (9, 3, 80, 5), (71, 1, 64, 16), (4, 4, 256, 32), (8, 2, 96, 16)],
)
def test_qkv_to_cache(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    qk_norm: bool,
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    close: Close,
) -> None:
    from raydata_llm.kernels.qkv_to_cache_triton import launch_qkv_to_cache

    tokens, blocks = 5, 6
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_dim, dtype=triton_dtype, device=triton_device)
    positions = torch.arange(tokens, device=triton_device) * 3
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(4))[:tokens].to(triton_device)
    angles = torch.outer(torch.arange(40.0), 10.0 ** -torch.linspace(0, 4, head_dim // 2))
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(triton_device)
    q_norm, k_norm = (draw(head_dim, dtype=triton_dtype, device=triton_device, seed=seed) for seed in (5, 6))
    shape = (blocks, kv_heads, block_size, head_dim)
    caches = [torch.full(shape, -7.0, dtype=triton_dtype, device=triton_device) for _ in range(2)]
    expected_caches = [torch.full(shape, -7.0, dtype=triton_dtype) for _ in range(2)]
    inputs = (qkv, positions, slots, table)
    host = (qkv.cpu(), positions.cpu(), slots.cpu(), table.cpu())
    if qk_norm:
        q = launch_qkv_to_cache(*inputs, caches[0], caches[1], q_norm, k_norm, 1e-6)
        expected = qkv_to_cache(*host, expected_caches[0], expected_caches[1], q_norm.cpu(), k_norm.cpu(), 1e-6)
    else:
        q = launch_qkv_to_cache(*inputs, caches[0], caches[1])
        expected = qkv_to_cache(*host, expected_caches[0], expected_caches[1])
    close(q, expected)
    # What no token is mapped to keeps its value, which a stray write would change.
    close(caches[0], expected_caches[0])
    assert torch.equal(caches[1].cpu(), expected_caches[1])
