"""Adapters in each form that PEFT writes, and the model's weights with each of them merged.

Tensors and their names as PEFT 0.21 writes them (compared with its own files once: see the commit); the merged weights
are made from PEFT's equations here, dense and in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Form:
    """An adapter of one kind.

    Args:
        settings: Of adapter_config.json.
        parts: Linears of all layers with A and B.
        whole: Modules with A and B beside these.
        saved: Modules with a weight of their own.
        base: What stands in the file as the base's weight of `whole`: "same", "other", or nothing.
        biases: Parts with biases of their own.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    base: str = ""
    biases: tuple[str, ...] = ()


FORMS = {
    "plain": Form(parts=ATTENTION),
    "ranks and alphas by pattern": Form(
        settings={
            "rank_pattern": {"self_attn.q_proj": 3, r"layers\.1\.mlp\.\w+": 5, "v_proj": 1},
            "alpha_pattern": {"^model.layers.0.mlp.down_proj": 1, r".*1.self_attn.v_proj": 9, "q_proj": 0.5},
        },
        parts=(*ATTENTION, *MLP),
    ),
    "rank-stabilised by pattern": Form(
        settings={"use_rslora": True, "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"up_proj": 3}}, parts=MLP
    ),
    "head": Form(parts=("self_attn.v_proj",), whole=(HEAD,)),
    "embedding": Form(parts=("self_attn.q_proj",), whole=(EMBEDDING,), base="same"),
    "head and embedding with weights": Form(whole=(HEAD, EMBEDDING), base="other"),
    "saved head": Form(parts=("mlp.up_proj",), saved=(HEAD,)),
    "saved embedding": Form(parts=ATTENTION, saved=(EMBEDDING,)),
    "saved head and embedding": Form(parts=(*ATTENTION, *MLP), saved=(HEAD, EMBEDDING)),
    "dora": Form(settings={"use_dora": True}, parts=(*ATTENTION, *MLP)),
    "dora of some": Form(
        settings={"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        parts=("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"),
    ),
    "dora of head and embedding": Form(
        settings={"use_dora": True}, parts=("self_attn.o_proj",), whole=(HEAD, EMBEDDING), base="same"
    ),
    "dora of head with its weight": Form(settings={"use_dora": True}, whole=(HEAD, EMBEDDING), base="other"),
    "saved norms": Form(
        parts=("self_attn.q_proj",),
        saved=("model.norm", "model.layers.0.input_layernorm", "model.layers.2.post_attention_layernorm"),
    ),
    "saved linears": Form(
        parts=("mlp.up_proj",),
        saved=("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"),
    ),
    "saved at the ends": Form(
        saved=("model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.layers.2.mlp.gate_proj", HEAD)
    ),
    "biases": Form(settings={"bias": "all"}, parts=("self_attn.q_proj", "mlp.gate_proj"), biases=ATTENTION[:3]),
    "biases of dora": Form(
        settings={"bias": "lora_only", "use_dora": True}, parts=ATTENTION[:2], biases=("self_attn.q_proj",)
    ),
    "biases of b": Form(settings={"lora_bias": True}, parts=("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")),
}
RANK, ALPHA = 4, 6
RANK_LIMIT = 8


def write_form(folder: Path, form: Form, own: State, seed: int) -> State:
    """Write an adapter in that form; returns the model's state with it merged.

    Args:
        own: The model's state, its LM head's weight included.
    """
    maker = _Maker(form, own, seed)
    layers = 1 + max(int(found[1]) for name in own if (found := re.match(r"model\.layers\.(\d+)\.", name)))
    for module in (*(f"model.layers.{layer}.{part}" for layer in range(layers) for part in form.parts), *form.whole):
        maker.adapt(module)
    for module in form.saved:
        maker.save(module)
    for module in (f"model.layers.{layer}.{part}" for layer in range(layers) for part in form.biases):
        maker.rebias(module, is_adapted=module.split(".", 3)[3] in form.parts)
    folder.mkdir(parents=True)
    settings = {
        **{"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False, "revision": None},
        **{"megatron_core": "megatron.core", "qalora_group_size": 16, "lora_dropout": 0.1, "target_parameters": None},
        **{"modules_to_save": [module.split(".")[-1] for module in form.saved] or None, "init_lora_weights": True},
        **form.settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in maker.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return maker.merged


class _Maker:
    def __init__(self, form: Form, own: State, seed: int) -> None:
        self._settings, self._base = form.settings, form.base
        self.tensors: State = {}
        self.merged = dict(own)
        self._generator = torch.Generator().manual_seed(seed)

    def adapt(self, module: str) -> None:
        rank = self._of("rank_pattern", module, RANK)
        scale = self._of("alpha_pattern", module, ALPHA) / (rank**0.5 if self._settings.get("use_rslora") else rank)
        weight = self.merged[f"{module}.weight"]
        if self._base and module in (HEAD, EMBEDDING):
            weight = weight + 0.1 * self._draw(*weight.shape) if self._base == "other" else weight
            self.tensors[f"{module}.base_layer.weight"] = weight
        if module == EMBEDDING:
            weight = weight.t()
        outputs, inputs = weight.shape
        a, b = self._draw(rank, inputs) / inputs**0.5, 0.7 * self._draw(outputs, rank) / rank**0.5
        sides = ("lora_embedding_A", "lora_embedding_B") if module == EMBEDDING else ("lora_A.weight", "lora_B.weight")
        self.tensors |= {f"{module}.{side}": one for side, one in zip(sides, (a, b), strict=True)}
        changed = weight + scale * b @ a
        if self._settings.get("use_dora"):
            # The norm over a weight's inputs; of the embedding, these are the tokens.
            magnitude = changed.norm(dim=1) * (1 + 0.3 * self._draw(outputs))
            self.tensors[f"{module}.lora_magnitude_vector"] = magnitude
            changed = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        if self._settings.get("lora_bias"):
            added = self._draw(outputs)
            self.tensors[f"{module}.lora_B.bias"] = added
            self.merged[f"{module}.bias"] = self.merged.get(f"{module}.bias", torch.zeros(outputs)) + scale * added
        self.merged[f"{module}.weight"] = changed.t() if module == EMBEDDING else changed

    def save(self, module: str) -> None:
        weight = self.merged[f"{module}.weight"]
        self.tensors[f"{module}.weight"] = self.merged[f"{module}.weight"] = weight + 0.2 * self._draw(*weight.shape)
        if f"{module}.bias" in self.merged:
            self.rebias(module, is_adapted=False)

    def rebias(self, module: str, *, is_adapted: bool) -> None:
        bias = self.merged[f"{module}.bias"] + self._draw(len(self.merged[f"{module}.bias"]))
        self.tensors[f"{module}.base_layer.bias" if is_adapted else f"{module}.bias"] = bias
        self.merged[f"{module}.bias"] = bias

    def _draw(self, *shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(shape, generator=self._generator)
        return drawn

    def _of(self, name: str, module: str, otherwise: float) -> Any:
        for key, value in self._settings.get(name, {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return otherwise
