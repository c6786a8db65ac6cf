"""Model shapes and workloads that engines are compared on: token ids in, a fixed number of tokens out.

The draws are seeded, so every engine is measured on the same work; EOS is ignored by the caller. Changing anything here
makes old figures incomparable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Work = list[tuple[list[int], int]]

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "initializer_range": 0.02,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, **_LLAMA3_ROPE},
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": {"factor": 8.0, **_LLAMA3_ROPE},
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """Write a shape's config.json into `folder`/`name`; the weights are the dummy loader's."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return path


def _token_ids(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    drawn: list[int] = rng.integers(100, vocab_size - 100, size=count).tolist()
    return drawn


def mixed(vocab_size: int, num_rows: int = 1024) -> Work:
    """Chat-like: 1024 rows, prompts and outputs of 100..1024 tokens, uniform."""
    rng = np.random.default_rng(0)
    return [
        (_token_ids(rng, int(rng.integers(100, 1025)), vocab_size), int(rng.integers(100, 1025)))
        for _ in range(num_rows)
    ]


def classify(vocab_size: int) -> Work:
    """Prefill-heavy: 2048 rows, 512 tokens in, 8 out."""
    rng = np.random.default_rng(1)
    return [(_token_ids(rng, 512, vocab_size), 8) for _ in range(2048)]


def decode(vocab_size: int) -> Work:
    """Decode-heavy: 1024 rows, 64 tokens in, 512 out."""
    rng = np.random.default_rng(2)
    return [(_token_ids(rng, 64, vocab_size), 512) for _ in range(1024)]


def prefix(vocab_size: int) -> Work:
    """Shared prefix: 2048 rows of one 2048-token prefix and 64 tokens of their own, 64 out."""
    rng = np.random.default_rng(3)
    shared = _token_ids(rng, 2048, vocab_size)
    return [(shared + _token_ids(rng, 64, vocab_size), 64) for _ in range(2048)]


def prefixes(vocab_size: int) -> Work:
    """Many shared prefixes: as `prefix`, but 32 prefixes of 2048 tokens, 64 rows each, in random order."""
    rng = np.random.default_rng(6)
    shared = [_token_ids(rng, 2048, vocab_size) for _ in range(32)]
    order = rng.permutation(np.repeat(np.arange(32), 64)).tolist()
    return [(shared[index] + _token_ids(rng, 64, vocab_size), 64) for index in order]


def long(vocab_size: int) -> Work:
    """Long prompts: 64 rows, 16,384 tokens in, 256 out."""
    rng = np.random.default_rng(4)
    return [(_token_ids(rng, 16384, vocab_size), 256) for _ in range(64)]


def eos(vocab_size: int) -> Work:
    """Unknown lengths: 1024 rows, 256 tokens in, ending by themselves at the drawn length (log-normal, median 200).

    Each row asks for `EOS_MAX_TOKENS`; the benchmark makes the engine draw EOS where the row is to end.
    """
    rng = np.random.default_rng(5)
    return [
        (
            _token_ids(rng, 256, vocab_size),
            int(np.clip(np.exp(rng.normal(np.log(200), 0.8)), 8, EOS_MAX_TOKENS)),
        )
        for _ in range(1024)
    ]


EOS_MAX_TOKENS = 2048
# Prefixes of 2048 tokens that the prompts of a workload share.
NUM_SHARED = {"prefix": 1, "prefixes": 32}
WORKLOADS: dict[str, Callable[[int], Work]] = {
    "mixed": mixed,
    "classify": classify,
    "decode": decode,
    "prefix": prefix,
    "prefixes": prefixes,
    "long": long,
    "eos": eos,
    # The same lengths, but told to the scheduler.
    "eos-told": eos,
}
