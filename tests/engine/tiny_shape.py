"""A model of two small layers, for dummy weights on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.workloads import SHAPES


def write_tiny_shape(folder: Path) -> Path:
    """Write the config into `folder`; returns it."""
    config = SHAPES["llama-3.2-1b"] | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
