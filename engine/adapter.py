"""A LoRA adapter's files, as PEFT writes them, turned into what the decoder's fused linears add.

Owns adapter_config.json and the names of the adapter's tensors. Knows no slots and no device: an adapter is read to the
host once and copied to a slot when a row asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydata_llm.engine.model_config import ModelConfig

# A fused linear's parts, in order.
FUSED_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
_NAME = re.compile(r"^base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])(?:\.default)?\.weight$")
# What would change the answer and is not computed here, with the values that ask for nothing.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter on the host.

    Args:
        rank: R.
        layers: For each layer, fused linear -> (A [parts * R, in], B [out, R], scaled); linears without are left out.
    """

    rank: int
    layers: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]


def read_adapter(folder: Path, config: ModelConfig, *, max_rank: int) -> Adapter:
    """Read a folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        ValueError: for an adapter that is none, that asks for more than is computed here, or of another model.
    """
    settings = _settings(folder)
    rank = settings.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise ValueError(f"the adapter {str(folder)!r} has rank {rank!r}, above max_lora_rank={max_rank}: raise that")
    alpha = settings.get("lora_alpha") or rank
    if not isinstance(alpha, int | float):
        raise ValueError(f"the adapter {str(folder)!r} has lora_alpha={alpha!r}: give a number")
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    found = _by_place(folder, _tensors(folder), config)
    layers = []
    for index in range(config.num_layers):
        layer = {}
        for fused, parts in FUSED_PARTS.items():
            if any((index, part) in found for part in parts):
                layer[fused] = _fuse(folder, index, parts, found, config, rank, scale)
        layers.append(layer)
    return Adapter(rank=rank, layers=layers)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"lora_path={str(folder)!r} is no adapter: {path.name}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"lora_path={str(folder)!r} is no adapter: {path.name} holds a {type(settings).__name__}")
    for name, off in _OFF.items():
        if settings.get(name) not in off:
            raise ValueError(f"the adapter {str(folder)!r} has {name}={settings[name]!r}, which is not supported yet")
    return settings


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise ValueError(f"lora_path={str(folder)!r} has neither adapter_model.safetensors nor adapter_model.bin")
    try:
        return _read(path)
    except Exception as error:  # of either library's own kinds, and no more than one request is to fail of it
        cause = str(error).split("\n")[0]
        raise ValueError(f"the adapter {str(folder)!r} is damaged: {path.name} cannot be read: {cause}") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


_Found = dict[tuple[int, str], dict[str, torch.Tensor]]


def _by_place(folder: Path, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> _Found:
    shapes = config.parameter_shapes()
    found: _Found = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        weight = match and f"model.layers.{match[1]}.{match[2]}.weight"
        if match is None or weight not in shapes:
            raise ValueError(
                f"the adapter {str(folder)!r} changes {name}: only the linears of this model's "
                f"{config.num_layers} layers are supported"
            )
        pair = found.setdefault((int(match[1]), match[2]), {})
        pair[match[3]] = tensor
        side = shapes[weight][1] if match[3] == "A" else shapes[weight][0]
        if tensor.ndim != 2 or tensor.shape[1 if match[3] == "A" else 0] != side:
            raise ValueError(
                f"the adapter {str(folder)!r} is of another model: {name} has shape {tuple(tensor.shape)}, and "
                f"{weight} has {shapes[weight]}"
            )
    return found


def _fuse(
    folder: Path, index: int, parts: tuple[str, ...], found: _Found, config: ModelConfig, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = [config.parameter_shapes()[f"model.layers.{index}.{part}.weight"] for part in parts]
    a = torch.zeros((len(parts) * rank, shapes[0][1]), dtype=torch.float32)
    b = torch.zeros((sum(shape[0] for shape in shapes), rank), dtype=torch.float32)
    first = 0
    for number, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        pair = found.get((index, part))
        if pair is not None:
            if pair.keys() != {"A", "B"} or len(pair["A"]) != rank or pair["B"].shape[1] != rank:
                raise ValueError(f"the adapter {str(folder)!r} has no pair of rank {rank} for layer {index}'s {part}")
            a[number * rank : (number + 1) * rank] = pair["A"]
            b[first : first + shape[0]] = pair["B"] * scale
        first += shape[0]
    return a, b
