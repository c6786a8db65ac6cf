"""An encoder's sizes and switches (BERT, RoBERTa, XLM-RoBERTa, DistilBERT), translated from a Hugging Face config.

Owns which families there are, where their checkpoints keep what, and the names and shapes of all parameters, in
BERT's names. Knows no tensors and no head (see `pooling_model.py`).
Invariant: an EncoderConfig describes a model that `Encoder` runs; everything else was refused with a ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raydata_llm.engine.config_fields import (
    MOST_HEADS,
    MOST_HIDDEN,
    MOST_LAYERS,
    REMEDY,
    bad_field,
    read_flag,
    read_integer,
    read_number,
)

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """What differs between the families.

    Args:
        model_type: As in config.json.
        prefix: Of the encoder's parameters in a checkpoint that has a head too.
        keys: This family's name of a config key that BERT calls otherwise, by BERT's.
        renames: Patterns of parameter names and what BERT calls them.
        token_types: Whether the two texts of a pair have embeddings of their own.
        positions_after_pad: Positions count from pad_token_id + 1, as fairseq's did.
    """

    model_type: str
    prefix: str
    keys: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    token_types: bool = True
    positions_after_pad: bool = False


_FAMILIES = (
    EncoderFamily(model_type="bert", prefix="bert."),
    EncoderFamily(model_type="roberta", prefix="roberta.", positions_after_pad=True),
    EncoderFamily(model_type="xlm-roberta", prefix="roberta.", positions_after_pad=True),
    EncoderFamily(
        model_type="distilbert",
        prefix="distilbert.",
        keys={
            "hidden_size": "dim",
            "intermediate_size": "hidden_dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "hidden_act": "activation",
        },
        renames=(
            (r"^transformer\.", "encoder."),
            (r"\.attention\.q_lin\.", ".attention.self.query."),
            (r"\.attention\.k_lin\.", ".attention.self.key."),
            (r"\.attention\.v_lin\.", ".attention.self.value."),
            (r"\.attention\.out_lin\.", ".attention.output.dense."),
            (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
            (r"\.ffn\.lin1\.", ".intermediate.dense."),
            (r"\.ffn\.lin2\.", ".output.dense."),
            (r"\.output_layer_norm\.", ".output.LayerNorm."),
        ),
        token_types=False,
    ),
)
ENCODER_FAMILIES = {family.model_type: family for family in _FAMILIES}
# LayerNorm's parameters in BERT checkpoints that were converted from TensorFlow's.
_OLD_NORMS = ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias"))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the encoder has to know of a model.

    Args:
        family: Where its checkpoints keep what.
        first_position: Position of a row's first token.
        type_vocab_size: 0 where the two texts of a pair are not told apart.
        dtype: The checkpoint's own.
    """

    family: EncoderFamily
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    first_position: int
    layer_norm_eps: float
    activation: str
    initializer_range: float
    dtype: str

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise bad_field("hidden_size", self.hidden_size, f"give a multiple of num_attention_heads={self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise bad_field("hidden_act", self.activation, f"choose one of {', '.join(ACTIVATIONS)}")
        if self.dtype not in _DTYPES:
            raise bad_field("dtype", self.dtype, f"choose one of {', '.join(_DTYPES)}")

    @classmethod
    def from_hf(cls, given: Mapping[str, Any]) -> EncoderConfig:
        """Translate a config.json.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        family = ENCODER_FAMILIES[given["model_type"]]
        config = {**given, **{name: given[key] for name, key in family.keys.items() if key in given}}
        _refuse_unsupported(config)
        first = read_integer(config, "pad_token_id", low=0) + 1 if family.positions_after_pad else 0
        return cls(
            family=family,
            vocab_size=read_integer(config, "vocab_size"),
            hidden_size=read_integer(config, "hidden_size", high=MOST_HIDDEN),
            intermediate_size=read_integer(config, "intermediate_size", high=MOST_HIDDEN),
            num_layers=read_integer(config, "num_hidden_layers", high=MOST_LAYERS),
            num_heads=read_integer(config, "num_attention_heads", high=MOST_HEADS),
            max_position_embeddings=read_integer(config, "max_position_embeddings"),
            type_vocab_size=read_integer({"type_vocab_size": 2, **config}, "type_vocab_size")
            if family.token_types
            else 0,
            first_position=first,
            layer_norm_eps=read_number(config, "layer_norm_eps", default=1e-12),
            activation=str(config.get("hidden_act") or "gelu"),
            initializer_range=read_number(config, "initializer_range", default=0.02),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    @property
    def head_dim(self) -> int:
        """Values of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def context_length(self) -> int:
        """Tokens that a row may have."""
        return self.max_position_embeddings - self.first_position

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """All parameters' shapes, in BERT's names without its prefix; a linear weight is [out, in]."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocab_size, hidden),
            "embeddings.position_embeddings.weight": (self.max_position_embeddings, hidden),
        }
        if self.type_vocab_size:
            shapes["embeddings.token_type_embeddings.weight"] = (self.type_vocab_size, hidden)
        shapes |= _norm_shapes("embeddings.LayerNorm", hidden)
        for layer in range(self.num_layers):
            name = f"encoder.layer.{layer}"
            for part in ("query", "key", "value"):
                shapes |= linear_shapes(f"{name}.attention.self.{part}", hidden, hidden)
            shapes |= linear_shapes(f"{name}.attention.output.dense", hidden, hidden)
            shapes |= _norm_shapes(f"{name}.attention.output.LayerNorm", hidden)
            shapes |= linear_shapes(f"{name}.intermediate.dense", inner, hidden)
            shapes |= linear_shapes(f"{name}.output.dense", hidden, inner)
            shapes |= _norm_shapes(f"{name}.output.LayerNorm", hidden)
        return shapes

    def parameter_name(self, stored: str) -> str:
        """Our name of a checkpoint's tensor."""
        name = stored.removeprefix(self.family.prefix)
        for pattern, replacement in (*self.family.renames, *_OLD_NORMS):
            name = re.sub(pattern, replacement, name)
        return name


def linear_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Of a linear layer with a bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise bad_field("position_embedding_type", kind, "the engine runs absolute positions; choose another model")
    for name in ("is_decoder", "add_cross_attention"):
        if read_flag(config, name, default=False):
            raise bad_field(name, True, f"the engine runs encoders alone; {REMEDY}")
    if config.get("quantization_config"):
        problem = "quantised encoders are not run; give the unquantised model"
        raise bad_field("quantization_config", config["quantization_config"], problem)
