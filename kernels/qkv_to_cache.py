"""QK-norm, rotary embedding and the write of K and V into the paged cache, in one pass over a layer's QKV.

    q, k, v = split(qkv)
    q, k    = rms_norm(q, q_norm), rms_norm(k, k_norm)             models with QK-norm
    rotate(x)[i], rotate(x)[i + half] = x[i] cos - x[i + half] sin, x[i + half] cos + x[i] sin
    k_cache[slot / block_size, :, slot % block_size] = rotate(k); v_cache likewise = v

dtype policy: rotation in float32 where the model's dtype is narrower; the result is rounded once.
Shapes: T tokens, H heads, K KV heads, D head_dim; qkv [T, (H + 2K) * D], cache [blocks, K, block_size, D],
rope_table [max_len, D] float32 (cosines, then sines), positions and slot_mapping [T] int64.
"""

from __future__ import annotations

import torch

from raydata_llm.kernels.rms_norm import rms_norm_ref


def rotate_ref(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, D] by angles given as cos_sin [T, D]."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def qkv_to_cache_ref(
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
    """The equation, all tokens at once; what a CPU runs too."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None and k_norm is not None:
        q = rms_norm_ref(qk[:, :-num_kv_heads], q_norm, eps)
        qk = torch.cat([q, rms_norm_ref(qk[:, -num_kv_heads:], k_norm, eps)], dim=1)
    qk = rotate_ref(qk, rope_table[positions])
    block, offset = slot_mapping // k_cache.shape[2], slot_mapping % k_cache.shape[2]
    k_cache[block, :, offset] = qk[:, -num_kv_heads:]
    v_cache[block, :, offset] = v
    return qk[:, :-num_kv_heads]


def qkv_to_cache(
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
    """Write the tokens' K and V into the cache.

    Args:
        q_norm, k_norm: [D] weights of QK-norm, both or neither.

    Returns:
        The rotated queries, [T, H, D].
    """
    if qkv.is_cuda:
        from raydata_llm.kernels.qkv_to_cache_triton import launch_qkv_to_cache

        return launch_qkv_to_cache(qkv, positions, slot_mapping, rope_table, k_cache, v_cache, q_norm, k_norm, eps)
    return qkv_to_cache_ref(qkv, positions, slot_mapping, rope_table, k_cache, v_cache, q_norm, k_norm, eps)
