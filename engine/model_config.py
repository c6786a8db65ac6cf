"""A model's sizes and switches, translated once from a Hugging Face config.

Owns the reading of config.json and the names and shapes of all parameters. Knows no tensors (importing it must not
import torch), so a driver can check a model before any device is taken.
Invariant: a ModelConfig describes a model that the decoder runs; everything else was refused with a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    read_optional_integer,
    read_token_ids,
)
from raydata_llm.engine.families import Family, find_family
from raydata_llm.engine.rope_config import RopeConfig

__all__ = ["ModelConfig", "RopeConfig"]

_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the decoder has to know of a model.

    Args:
        architecture: The family's class name in transformers.
        max_position_embeddings: The config's own value; see `context_length` for what RoPE scaling makes of it.
        qkv_bias, o_bias, mlp_bias: Which projections have a bias.
        qk_norm: RMSNorm over head_dim on each query and key head.
        sliding_windows: One a layer; None: full attention; w: keys with query position - key position < w.
        dtype: The checkpoint's own: "float32", "bfloat16" or "float16".
        eos_token_ids: The config's end tokens (generation_config may add some, see ModelFiles.eos_token_ids).
        initializer_range: Standard deviation of dummy weights.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    initializer_range: float

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            problem = f"it must be a multiple of num_key_value_heads={self.num_kv_heads}"
            raise bad_field("num_attention_heads", self.num_heads, problem)
        if self.head_dim % 2:
            raise bad_field("head_dim", self.head_dim, f"RoPE turns pairs, so it must be even; {REMEDY}")
        if len(self.sliding_windows) != self.num_layers:
            raise bad_field("sliding_windows", self.sliding_windows, f"give one for each of {self.num_layers} layers")
        factors = self.rope.freq_factors
        if factors is not None and len(factors) != self.head_dim // 2:
            raise bad_field("freq_factors", factors, f"give head_dim / 2 = {self.head_dim // 2} of them")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Translate a config.json, of transformers 5 or older.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        family = find_family(config)
        config = {**family.defaults, **config}
        _refuse_unsupported(config)
        num_layers = read_integer(config, "num_hidden_layers", high=MOST_LAYERS)
        num_heads = read_integer(config, "num_attention_heads", high=MOST_HEADS)
        max_length = read_integer(config, "max_position_embeddings")
        config_bias = read_flag(config, "attention_bias", default=False) and family.attention_bias == "config"
        return cls(
            architecture=family.architecture,
            vocab_size=read_integer(config, "vocab_size"),
            hidden_size=read_integer(config, "hidden_size", high=MOST_HIDDEN),
            intermediate_size=read_integer(config, "intermediate_size", high=MOST_HIDDEN),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read_optional_integer(config, "num_key_value_heads", high=MOST_HEADS) or num_heads,
            head_dim=_read_head_dim(config, num_heads),
            rms_norm_eps=read_number(config, "rms_norm_eps"),
            max_position_embeddings=max_length,
            rope=RopeConfig.from_hf(config, max_length),
            tie_word_embeddings=read_flag(config, "tie_word_embeddings", default=False),
            qkv_bias=config_bias or family.attention_bias == "qkv",
            o_bias=config_bias,
            mlp_bias=family.mlp_bias_in_config and read_flag(config, "mlp_bias", default=False),
            qk_norm=family.qk_norm,
            sliding_windows=_read_windows(config, family, num_layers),
            dtype=_read_dtype(config),
            eos_token_ids=read_token_ids(config, "eos_token_id"),
            bos_token_id=read_optional_integer(config, "bos_token_id", low=0),
            initializer_range=read_number(config, "initializer_range", default=0.02),
        )

    @property
    def context_length(self) -> int:
        """Tokens a row may have: linear and yarn scaling lengthen the config's own limit, by vLLM's rule."""
        base, rope = self.max_position_embeddings, self.rope
        if rope.rope_type == "linear":
            return int(base * rope.factor)
        if rope.rope_type == "yarn" and rope.original_max_position_embeddings:
            return max(base, int(rope.original_max_position_embeddings * rope.factor))
        return base

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """All parameters' shapes, in Hugging Face's names; a linear weight is [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q_size, self.hidden_size, self.qkv_bias),
            "self_attn.k_proj": (kv_size, self.hidden_size, self.qkv_bias),
            "self_attn.v_proj": (kv_size, self.hidden_size, self.qkv_bias),
            "self_attn.o_proj": (self.hidden_size, q_size, self.o_bias),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size, self.mlp_bias),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size, self.mlp_bias),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {f"self_attn.{name}.weight": (self.head_dim,) for name in ("q_norm", "k_norm")}
        norms = ("input_layernorm", "post_attention_layernorm")
        return shapes | {f"{name}.weight": (self.hidden_size,) for name in norms}

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values that one token takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        problem = "quantised checkpoints are not run; give the unquantised model, or a GGUF file"
        raise bad_field("quantization_config", quantization, problem)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if (read_optional_integer(config, name, low=0) or 0) > 1:
            raise bad_field(name, config[name], "mixtures of experts are not run; choose a dense model")
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise bad_field("hidden_act", activation, "the engine runs silu only; choose another model")


def _read_head_dim(config: Mapping[str, Any], num_heads: int) -> int:
    head_dim = read_optional_integer(config, "head_dim", high=MOST_HIDDEN)
    if head_dim is not None:
        return head_dim
    hidden_size = read_integer(config, "hidden_size", high=MOST_HIDDEN)
    if hidden_size % num_heads:
        problem = f"without head_dim it must be a multiple of num_attention_heads={num_heads}"
        raise bad_field("hidden_size", hidden_size, problem)
    return hidden_size // num_heads


def _read_windows(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    opted_out = family.sliding_window == "opt_in" and not read_flag(config, "use_sliding_window", default=False)
    if family.sliding_window == "never" or opted_out:
        return (None,) * num_layers
    window = read_optional_integer(config, "sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        _check_layer_types(layer_types, num_layers)
        return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
    first = read_integer(config, "max_window_layers", low=0) if family.sliding_window == "opt_in" else 0
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _check_layer_types(layer_types: Any, num_layers: int) -> None:
    if not isinstance(layer_types, (list, tuple)) or len(layer_types) != num_layers:
        raise bad_field("layer_types", layer_types, f"give one for each of {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in _LAYER_TYPES:
            raise bad_field("layer_types", layer_type, f"the engine runs {' and '.join(_LAYER_TYPES)}")


def _read_dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise bad_field("dtype", dtype, f"choose one of {', '.join(_DTYPES)}")
    return name
