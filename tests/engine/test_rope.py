"""RoPE's tables are transformers' own, bit for bit, for every scaling that the engine runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from raydata_llm.engine.model_config import ModelConfig, RopeConfig
from raydata_llm.engine.rope import attention_factor, inverse_frequencies, rope_table

HEAD_DIM = 24
MAX_LENGTH = 4096
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def read_both(parameters: dict[str, Any], head_dim: int = HEAD_DIM) -> tuple[RopeConfig, LlamaRotaryEmbedding]:
    """The engine's settings and transformers' module for the same config."""
    config = LlamaConfig(
        hidden_size=6 * head_dim,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters=dict(parameters),
    )
    return ModelConfig.from_hf(config.to_dict()).rope, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"rope_type": "default", "rope_theta": 1e4}, id="default"),
        pytest.param({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, id="linear"),
        pytest.param(LLAMA3, id="llama3"),
        pytest.param({**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0}, id="llama3-other"),
        pytest.param(YARN, id="yarn"),
        pytest.param({**YARN, "attention_factor": 1.3}, id="yarn-attention-factor"),
        pytest.param({**YARN, "beta_fast": 16, "beta_slow": 2}, id="yarn-betas"),
        pytest.param({**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, id="yarn-mscale"),
        pytest.param({**YARN, "truncate": False}, id="yarn-untruncated"),
        pytest.param({**YARN, "factor": None}, id="yarn-factor-from-lengths"),
        pytest.param({**YARN, "original_max_position_embeddings": 8}, id="yarn-ramp-without-width"),
        pytest.param({**YARN, "rope_theta": 12.0}, id="yarn-ramp-beyond-the-head"),
    ],
)
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 128])
def test_the_table_is_that_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    rope, module = read_both(parameters, head_dim)
    positions = torch.arange(MAX_LENGTH)
    cos, sin = module(torch.zeros(1), positions[None])
    table = rope_table(rope, head_dim, MAX_LENGTH, torch.device("cpu"))
    assert table.shape == (MAX_LENGTH, head_dim) and table.dtype == torch.float32
    assert torch.equal(inverse_frequencies(rope, head_dim), module.inv_freq)
    assert math.isclose(attention_factor(rope), module.attention_scaling, rel_tol=1e-15)
    torch.testing.assert_close(table[:, : head_dim // 2], cos[0, :, : head_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, head_dim // 2 :], sin[0, :, : head_dim // 2], rtol=0, atol=1e-6)


def test_a_row_does_not_depend_on_the_tables_length() -> None:
    rope, _ = read_both(YARN)
    long = rope_table(rope, HEAD_DIM, 999, "cpu")
    assert torch.equal(rope_table(rope, HEAD_DIM, 37, "cpu"), long[:37])


def test_freq_factors_divide_the_frequencies() -> None:
    factors = tuple(1.0 + i for i in range(HEAD_DIM // 2))
    plain = inverse_frequencies(RopeConfig(theta=1e4), HEAD_DIM)
    scaled = inverse_frequencies(RopeConfig(theta=1e4, freq_factors=factors), HEAD_DIM)
    torch.testing.assert_close(scaled * torch.tensor(factors), plain)


def test_llama3_scaling_equals_the_freq_factors_that_llama_cpp_stores_for_it() -> None:
    rope, module = read_both(LLAMA3)
    factors = inverse_frequencies(RopeConfig(theta=rope.theta), HEAD_DIM) / module.inv_freq
    from_factors = RopeConfig(theta=rope.theta, freq_factors=tuple(factors.tolist()))
    torch.testing.assert_close(inverse_frequencies(from_factors, HEAD_DIM), module.inv_freq)


@pytest.mark.gpu
def test_the_gpus_table_is_the_cpus() -> None:
    rope, _ = read_both(LLAMA3)
    on_gpu = rope_table(rope, HEAD_DIM, 100, torch.device("cuda"))
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), rope_table(rope, HEAD_DIM, 100, "cpu"))
