"""Settings of the rotary position embedding, translated once from either style of config.json.

Owns the names, defaults and refusals of RoPE's scalings. Knows no tensors (no torch import); engine/rope.py computes.
Invariant: a RopeConfig holds everything that its rope type needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from raydata_llm.engine.config_fields import (
    REMEDY,
    bad_field,
    read_flag,
    read_integer,
    read_mapping,
    read_number,
    read_optional_integer,
    read_optional_number,
)
from raydata_llm.engine.regular_file import shown

RopeType = Literal["default", "linear", "llama3", "yarn"]
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Settings of RoPE; names as in transformers' `rope_parameters`.

    Args:
        rope_type: Which scaling.
        theta: Base of the wavelengths.
        factor: By how much linear, llama3 and yarn stretch positions.
        original_max_position_embeddings: Length the model was trained on before stretching (llama3, yarn).
        low_freq_factor, high_freq_factor: llama3: the wavelengths between original/high and original/low are blended.
        beta_fast, beta_slow: yarn: rotations over the original length between which the ramp runs.
        attention_factor: yarn: multiplies cos and sin; None: computed from factor, mscale and mscale_all_dim.
        mscale, mscale_all_dim: yarn, see `attention_factor`.
        truncate: yarn: the ramp begins and ends at whole dimensions.
        freq_factors: inv_freq is divided by these, head_dim / 2 of them (GGUF's rope_freqs.weight).
    """

    rope_type: RopeType = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """Translate `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

        Raises:
            ValueError: for a rope type that is not run, or a missing or wrong parameter.
        """
        # As in transformers, rope_scaling wins where both are given.
        parameters = read_mapping(config, "rope_scaling") or read_mapping(config, "rope_parameters")
        _refuse_nested(parameters)
        _refuse_partial(config, parameters)
        default_theta = read_number(config, "rope_theta", default=_DEFAULT_THETA)
        theta = read_number(parameters, "rope_theta", default=default_theta)
        rope_type = _read_type(parameters)
        return cls(
            rope_type=rope_type,
            theta=theta,
            freq_factors=_read_freq_factors(parameters),
            **_read_scaling(rope_type, parameters, _original_length(config, parameters, max_position_embeddings)),
            **(_read_yarn(parameters, max_position_embeddings) if rope_type == "yarn" else {}),
        )


def _read_type(parameters: Mapping[str, Any]) -> RopeType:
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"rope_type={shown(rope_type)} in the model's config is not supported: "
            f"choose one of {', '.join(_ROPE_TYPES)}. "
            "If no row is longer than the model's original length, replace it with "
            "engine_kwargs={'hf_overrides': {'rope_parameters': {'rope_type': 'default'}}}"
        )
    return cast(RopeType, rope_type)


def _original_length(config: Mapping[str, Any], parameters: Mapping[str, Any], max_length: int) -> int:
    name = "original_max_position_embeddings"
    return read_optional_integer(config, name) or read_optional_integer(parameters, name) or max_length


def _read_scaling(rope_type: RopeType, parameters: Mapping[str, Any], original_length: int) -> dict[str, Any]:
    if rope_type == "linear":
        return {"factor": read_number(parameters, "factor")}
    if rope_type != "llama3":
        return {"original_max_position_embeddings": original_length} if rope_type == "yarn" else {}
    scaling = {name: read_number(parameters, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        value = scaling["high_freq_factor"]
        raise bad_field("high_freq_factor", value, f"it must exceed low_freq_factor={scaling['low_freq_factor']}")
    return {"original_max_position_embeddings": original_length, **scaling}


def _read_yarn(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    if parameters.get("factor") is None:
        # Checkpoints that leave the factor out mean the ratio of the two lengths.
        factor = max_position_embeddings / read_integer(parameters, "original_max_position_embeddings")
    else:
        factor = read_number(parameters, "factor")
    return {
        "factor": factor,
        "beta_fast": read_optional_number(parameters, "beta_fast") or 32.0,
        "beta_slow": read_optional_number(parameters, "beta_slow") or 1.0,
        "attention_factor": read_optional_number(parameters, "attention_factor"),
        "mscale": read_optional_number(parameters, "mscale"),
        "mscale_all_dim": read_optional_number(parameters, "mscale_all_dim"),
        "truncate": read_flag(parameters, "truncate", default=True),
    }


def _read_freq_factors(parameters: Mapping[str, Any]) -> tuple[float, ...] | None:
    factors = parameters.get("freq_factors")
    if factors is None:
        return None
    if not isinstance(factors, list | tuple):
        raise bad_field("freq_factors", factors, f"it must be a list of numbers; {REMEDY}")
    return tuple(read_number({"freq_factors": factor}, "freq_factors") for factor in factors)


def _refuse_nested(parameters: Mapping[str, Any]) -> None:
    for layer_type, value in parameters.items():
        if isinstance(value, Mapping):
            name = f"rope_parameters[{layer_type!r}]"
            raise bad_field(name, value, f"RoPE settings that differ between layers are not run; {REMEDY}")


def _refuse_partial(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    for source in (config, parameters):
        share = source.get("partial_rotary_factor")
        if share is not None and share != 1:
            problem = "RoPE on a part of each head is not run; choose another model"
            raise bad_field("partial_rotary_factor", share, problem)
