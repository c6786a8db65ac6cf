"""Random LoRA adapters of a model, saved as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raydata_llm.engine.adapter import FUSED_PARTS

RANK_LIMIT = 8
PARTS = [part for parts in FUSED_PARTS.values() for part in parts]


def adapter_pairs(model: Any, number: int) -> tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A rank, and A and B of some linears of all layers; adapters differ in both."""
    generator = torch.Generator().manual_seed(number)
    rank = 1 + number % RANK_LIMIT
    parts = PARTS if number % 3 == 0 else ["self_attn.q_proj", "self_attn.v_proj"] if number % 3 == 1 else PARTS[2::2]
    pairs = {}
    for layer in range(model.config.num_hidden_layers):
        for part in parts:
            outputs, inputs = model.get_parameter(f"model.layers.{layer}.{part}.weight").shape
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            pairs[f"model.layers.{layer}.{part}"] = (a, torch.randn(outputs, rank, generator=generator))
    return rank, pairs


def save_adapter(folder: Path, rank: int, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    sides = {"A": 0, "B": 1}
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": pair[at]
        for name, pair in pairs.items()
        for side, at in sides.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
