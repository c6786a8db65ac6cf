"""The table of cosines and sines that rotary position embedding multiplies queries and keys with.

Owns RoPE's formulas: default, linear, llama3 and yarn, as in transformers' `modeling_rope_utils`, to the last bit in
float32. Knows no model. Invariant: a table's row depends on its position alone, never on the table's length.
"""

from __future__ import annotations

import math

import torch

from raydata_llm.engine.rope_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_len: int, device: torch.device | str) -> torch.Tensor:
    """Cosines and sines of position * inverse frequency.

    Returns:
        float32 [max_len, head_dim]: head_dim / 2 cosines, then as many sines, times yarn's attention factor.
        Dimension i of a head turns with dimension i + head_dim / 2.
    """
    # On the CPU first: the table is then the same bits on every device.
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor(rope)
    return table.to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2] on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif rope.rope_type == "yarn":
        inv_freq = _yarn(rope, head_dim, rope.theta**exponents)
    if rope.freq_factors is not None:
        inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float32)
    return inv_freq


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: yarn's (https://arxiv.org/abs/2309.00071, section 3.4), otherwise 1."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    length = rope.original_max_position_embeddings
    assert length is not None
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / inv_freq
    stretched = torch.where(wavelengths > length / low, inv_freq / rope.factor, inv_freq)
    smooth = (length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, head_dim: int, wavelengths: torch.Tensor) -> torch.Tensor:
    """YaRN: dimensions that turn often over the original length are kept, those that turn seldom are stretched."""
    low, high = _yarn_ramp(rope, head_dim)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The dimensions between which yarn passes from kept to stretched."""
    length = rope.original_max_position_embeddings
    assert length is not None

    def dimension(rotations: float) -> float:
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A ramp of no width would divide by zero.
    return (low, high + 0.001) if low == high else (low, high)
