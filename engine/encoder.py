"""The one encoder that BERT, RoBERTa, XLM-RoBERTa and DistilBERT are specs of.

Owns the order of operations; the head is `pooler.py`'s. Knows no requests: packed rows in, hidden states out.

Shapes: T tokens, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raydata_llm.engine.decoder import Linear
from raydata_llm.engine.encoder_config import EncoderConfig
from raydata_llm.engine.packed_rows import PackedRows
from raydata_llm.kernels.varlen_attention import varlen_attention

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class LayerNorm:
    """Over the last dimension."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class EncoderLayer:
    """One layer's weights; q, k and v stand in one linear."""

    qkv: Linear
    out: Linear
    out_norm: LayerNorm
    up: Linear
    down: Linear
    down_norm: LayerNorm


class Encoder:
    """A loaded encoder.

    Args:
        config: The model.
        parameters: Every parameter of `config.parameter_shapes()`; q, k and v are taken out of it.
    """

    def __init__(self, config: EncoderConfig, parameters: dict[str, torch.Tensor]) -> None:
        self.config = config
        self._activation = _ACTIVATIONS[config.activation]
        self._words = parameters["embeddings.word_embeddings.weight"]
        self._positions = parameters["embeddings.position_embeddings.weight"]
        self._types = parameters.get("embeddings.token_type_embeddings.weight")
        self._norm = self._layer_norm(parameters, "embeddings.LayerNorm")
        self._layers = [self._layer(parameters, f"encoder.layer.{index}") for index in range(config.num_layers)]

    def forward(self, rows: PackedRows) -> torch.Tensor:
        """The last layer's hidden states: [T, hidden]."""
        x = self._norm(self._embed(rows))
        for layer in self._layers:
            x = layer.out_norm(layer.out(self._attend(layer.qkv(x), rows)) + x)
            x = layer.down_norm(layer.down(self._activation(layer.up(x))) + x)
        return x

    def _embed(self, rows: PackedRows) -> torch.Tensor:
        x = F.embedding(rows.token_ids, self._words)
        if self._types is not None:
            x = x + (self._types[0] if rows.token_types is None else F.embedding(rows.token_types, self._types))
        return x + F.embedding(rows.positions + self.config.first_position, self._positions)

    def _attend(self, qkv: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        q, k, v = qkv.view(len(qkv), 3, self.config.num_heads, self.config.head_dim).unbind(1)
        return varlen_attention(q, k, v, rows.starts, self.config.head_dim**-0.5).flatten(1)

    def _layer(self, parameters: dict[str, torch.Tensor], name: str) -> EncoderLayer:
        projections = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        # Popped, so that a model's weights are held once, but for one layer's.
        qkv = Linear(
            torch.cat([parameters.pop(f"{one}.weight") for one in projections]),
            torch.cat([parameters.pop(f"{one}.bias") for one in projections]),
        )
        return EncoderLayer(
            qkv=qkv,
            out=take_linear(parameters, f"{name}.attention.output.dense"),
            out_norm=self._layer_norm(parameters, f"{name}.attention.output.LayerNorm"),
            up=take_linear(parameters, f"{name}.intermediate.dense"),
            down=take_linear(parameters, f"{name}.output.dense"),
            down_norm=self._layer_norm(parameters, f"{name}.output.LayerNorm"),
        )

    def _layer_norm(self, parameters: Mapping[str, torch.Tensor], name: str) -> LayerNorm:
        return LayerNorm(parameters[f"{name}.weight"], parameters[f"{name}.bias"], self.config.layer_norm_eps)


def take_linear(parameters: Mapping[str, torch.Tensor], name: str) -> Linear:
    """A linear layer of a checkpoint, with its bias if it has one."""
    return Linear(parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))
