"""The Triton kernels of RMSNorm, SwiGLU and the QKV pass, against their references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raydata_llm.kernels.decode_inputs import decode_inputs_ref
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


@pytest.mark.parametrize("num_padding", [0, 1, 130])
def test_decode_inputs(num_padding: int, triton_device: torch.device) -> None:
    from raydata_llm.kernels.decode_inputs_triton import launch_decode_inputs

    generator = torch.Generator().manual_seed(0)
    num_slots, block_size = 150, 5
    last_token = torch.randint(0, 2**17, (num_slots + 1,), generator=generator).to(triton_device)
    num_computed = torch.randint(0, 35, (num_slots + 1,), generator=generator).int().to(triton_device)
    table = torch.randint(1, 2**30, (num_slots + 1, 7), generator=generator).int().to(triton_device)
    num_computed[-1], table[-1] = 0, 0
    slots = torch.randperm(num_slots, generator=generator)[:140].int()
    slots = torch.cat([slots, torch.full((num_padding,), num_slots, dtype=torch.int32)]).to(triton_device)
    counts = num_computed.clone()
    expected = decode_inputs_ref(slots, last_token, counts, table, block_size)
    result = launch_decode_inputs(slots, last_token, num_computed, table, block_size)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))
    assert torch.equal(num_computed, counts)
