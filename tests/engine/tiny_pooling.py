"""Tiny random pooling models, and what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

# Odd on purpose: a vocabulary that is prime, and a head_dim that is no power of 2.
ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 90,
    "initializer_range": 0.2,
}
DISTILBERT_SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "dim": 48,
    "hidden_dim": 80,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 90,
    "initializer_range": 0.2,
}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "bert": ENCODER_SIZES,
    "roberta": {**ENCODER_SIZES, "pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {**ENCODER_SIZES, "pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "distilbert": DISTILBERT_SIZES,
}
LENGTHS = (1, 2, 17, 5, 64, 33, 17, 80, 3)


def save_pooling_model(folder: Path, family: str, kind: str = "AutoModel", **settings: Any) -> Any:
    """Save a random model whose biases and norms are random too; returns transformers' model."""
    config = transformers.AutoConfig.for_model(family, **{**FAMILY_SETTINGS.get(family, {}), **settings})
    auto: Any = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261124)
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, float(name.endswith("orm.weight")), 0.2)
    model.save_pretrained(folder)
    return model.eval()


def draw_prompts(vocab_size: int = 331, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random token ids above the special ones."""
    rng = np.random.default_rng(1)
    return [rng.integers(5, vocab_size, size=length).tolist() for length in lengths]


@torch.no_grad()
def run_each(model: Any, prompts: list[list[int]], **extra: Any) -> list[Any]:
    """transformers' output of each prompt by itself."""
    return [model(torch.tensor([prompt]), **extra) for prompt in prompts]


# Sentence-transformers' files beside a model of ENCODER_SIZES.
HIDDEN, DENSE = 48, 20
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


def save_modules(folder: Path, *modules: tuple[str, dict[str, Any]], pooling: dict[str, Any] | None = None) -> None:
    """modules.json and its folders: the backbone, mean pooling unless said otherwise, then these modules."""
    listed = [("Transformer", ""), ("Pooling", "1_Pooling")]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    for number, (kind, settings) in enumerate(modules, 2):
        place = folder / f"{number}_{kind}"
        place.mkdir()
        (place / "config.json").write_text(json.dumps(settings))
        listed.append((kind, place.name))
    entries = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in listed]
    (folder / "modules.json").write_text(json.dumps(entries))


def dense(in_features: int = HIDDEN, out_features: int = DENSE, activation: str = TANH, **settings: Any) -> Any:
    """A Dense module's name and config.json."""
    sizes = {"in_features": in_features, "out_features": out_features, "bias": True}
    return "Dense", {**sizes, "activation_function": activation, **settings}


def save_layer(folder: Path, out_features: int = DENSE, in_features: int = HIDDEN, *, pickled: bool = False) -> Any:
    """Random weights of a Dense; returns (weight, bias)."""
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    state = {"linear.weight": weight, "linear.bias": bias}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return weight, bias
