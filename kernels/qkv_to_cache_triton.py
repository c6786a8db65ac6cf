"""The QKV pass on a GPU: a program takes some heads of one token from the projection to where attention reads them.

The equation, the dtype policy and the reference are in qkv_to_cache.py; imported only where the tensors are on a GPU.
Heads are numbered as they lie in qkv: H of q, K of k, K of v. A head is held as its two halves, which rotate with
each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import cdiv, next_power_of_2

# Elements of a program's tile: four warps of 16-byte loads.
_TILE = 1024


@triton.jit
def _norm_halves(
    low: tl.tensor,
    high: tl.tensor,
    norm_ptr: tl.tensor,
    dim: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMSNorm of heads given as halves [heads, D / 2], rounded as the reference rounds it."""
    mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / HEAD_DIM
    scale = tl.rsqrt(mean + eps)[:, None]
    low_weight = tl.load(norm_ptr + dim, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_weight = tl.load(norm_ptr + HEAD_DIM // 2 + dim, mask=inside, other=0.0).to(tl.float32)[None, :]
    low = ((low * scale).to(DTYPE).to(tl.float32) * low_weight).to(DTYPE).to(tl.float32)
    high = ((high * scale).to(DTYPE).to(tl.float32) * high_weight).to(DTYPE).to(tl.float32)
    return low, high


@triton.jit
def _qkv_to_cache_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    eps: tl.tensor,
    QKV_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    in_half = dim < HALF
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & in_half[None, :]
    source = qkv_ptr + token * QKV_STRIDE + head[:, None] * HEAD_DIM + dim[None, :]
    low_in = tl.load(source, mask=inside, other=0.0)
    high_in = tl.load(source + HALF, mask=inside, other=0.0)
    low, high = low_in.to(tl.float32), high_in.to(tl.float32)

    is_q = (head < HEADS)[:, None]
    if QK_NORM:
        q_low, q_high = _norm_halves(low, high, q_norm_ptr, dim, in_half, eps, HEAD_DIM, low_in.dtype)
        k_low, k_high = _norm_halves(low, high, k_norm_ptr, dim, in_half, eps, HEAD_DIM, low_in.dtype)
        low, high = tl.where(is_q, q_low, k_low), tl.where(is_q, q_high, k_high)
    angle = rope_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM + dim
    cos = tl.load(angle, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=in_half, other=0.0)[None, :]
    low, high = (low * cos - high * sin).to(low_in.dtype), (high * cos + low * sin).to(low_in.dtype)

    q_out = q_out_ptr + (token * HEADS + head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(q_out, low, mask=inside & is_q)
    tl.store(q_out + HALF, high, mask=inside & is_q)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    kv_head = tl.where(is_v, head[:, None] - HEADS - KV_HEADS, head[:, None] - HEADS)
    row = ((slot // BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    place = row * HEAD_DIM + dim[None, :]
    is_k = inside & (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
    tl.store(k_cache_ptr + place, low, mask=is_k)
    tl.store(k_cache_ptr + place + HALF, high, mask=is_k)
    tl.store(v_cache_ptr + place, low_in, mask=inside & is_v)
    tl.store(v_cache_ptr + place + HALF, high_in, mask=inside & is_v)


def launch_qkv_to_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    rope_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """As `qkv_to_cache.qkv_to_cache`; the queries come back contiguous."""
    tokens = qkv.shape[0]
    _, kv_heads, block_size, head_dim = k_cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert qkv.stride(1) == 1 and qkv.shape[1] == (heads + 2 * kv_heads) * head_dim, qkv.shape
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and v_cache.shape == k_cache.shape
    assert rope_table.is_contiguous() and rope_table.shape[1] == head_dim, rope_table.shape
    assert positions.shape[0] == slot_mapping.shape[0] == tokens and (q_norm is None) == (k_norm is None)
    q = qkv.new_empty((tokens, heads, head_dim))
    if not tokens:
        return q
    block_half = next_power_of_2(head_dim // 2)
    block_heads = max(1, _TILE // block_half)
    block_heads = min(block_heads, next_power_of_2(heads + 2 * kv_heads))
    _qkv_to_cache_kernel[(tokens, cdiv(heads + 2 * kv_heads, block_heads))](
        qkv,
        positions,
        slot_mapping,
        rope_table,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        q,
        eps,
        QKV_STRIDE=qkv.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QK_NORM=q_norm is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=4,
    )
    return q
