"""What differs between the model families that the engine runs: one spec each over one shared decoder.

Owns: which `model_type` is which family, where biases sit, QK-norm, how sliding windows are asked for, and the
values that Hugging Face's config class assumes for absent keys. Knows no sizes and no tensors (no torch import).
Invariant: all families share Hugging Face's Llama parameter names; a family with others needs a field here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raydata_llm.engine.config_fields import read_architectures
from raydata_llm.engine.regular_file import shown


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        model_type: As in config.json.
        architecture: The causal language model's class name, as in config.json's `architectures`.
        attention_bias: "never"; "qkv" (always, on q, k and v only); "config": all four projections if the config's
            `attention_bias` says so.
        mlp_bias_in_config: Whether the config's `mlp_bias` counts.
        qk_norm: RMSNorm over head_dim on every query and key head, before RoPE.
        sliding_window: "never"; "always" (the config's window on all layers); "opt_in" (only with
            `use_sliding_window`, from layer `max_window_layers` on). `layer_types` overrules the choice of layers.
        defaults: What Hugging Face's config class takes for absent keys (null is not absent).
    """

    model_type: str
    architecture: str
    attention_bias: Literal["never", "qkv", "config"] = "never"
    mlp_bias_in_config: bool = False
    qk_norm: bool = False
    sliding_window: Literal["never", "always", "opt_in"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    attention_bias="config",
    mlp_bias_in_config=True,
    defaults={"bos_token_id": 1, "eos_token_id": 2},
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    sliding_window="always",
    defaults={"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    attention_bias="qkv",
    sliding_window="opt_in",
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    attention_bias="config",
    qk_norm=True,
    sliding_window="opt_in",
    defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
)
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: for a model type or architecture that the engine does not run.
    """
    architectures = read_architectures(config)
    model_type = config.get("model_type")
    if model_type is None:
        model_type = _model_type_of(architectures)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={shown(model_type)} in the model's config is not supported: {_advice(model_type)}"
        )
    family = FAMILIES[model_type]
    if architectures and family.architecture not in architectures:
        raise ValueError(
            f"architectures={shown(architectures)} in the model's config is not supported: "
            f"of model_type {model_type!r} the engine runs {family.architecture}"
        )
    return family


def _model_type_of(architectures: list[str]) -> str:
    for family in FAMILIES.values():
        if family.architecture in architectures:
            return family.model_type
    if architectures:
        known = ", ".join(family.architecture for family in FAMILIES.values())
        raise ValueError(
            f"architectures={shown(architectures)} in the model's config is not supported: choose from {known}"
        )
    raise ValueError("model_type is missing from the model's config: give a folder of a Hugging Face causal model")


def _advice(model_type: object) -> str:
    known = ", ".join(sorted(FAMILIES))
    if "moe" in str(model_type) or model_type == "mixtral":
        return f"mixtures of experts are not run; choose a dense model of type {known}"
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    return f"choose a model of type {known}" + (f" (nearest: {near[0]})" if near else "")
