"""Typed reading of a config.json: every value is checked as it is read.

Owns the wording of what is wrong with a field. Knows no model.
Invariant: a value that is returned has the type asked for; anything else is a ValueError with field, value, remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from raydata_llm.engine.regular_file import shown

REMEDY = "correct config.json, or replace the value with engine_kwargs={'hf_overrides': {...}}"

# The engine counts tokens and positions in 32 bits.
MOST = 2**31 - 1
# The largest known models have 128 layers and 128 heads, and are 53,248 wide at most. Ten times that and more is taken
# for damage: all parameters are listed by name, before a tensor is read.
MOST_LAYERS, MOST_HEADS, MOST_HIDDEN, MOST_LABELS = 4096, 4096, 2**20, 2**20
_LARGEST = sys.float_info.max


def bad_field(name: str, value: object, problem: str) -> ValueError:
    """The error for a field whose value cannot be used."""
    return ValueError(f"{name}={shown(value)} in the model's config is not valid: {problem}")


def read_integer(config: Mapping[str, Any], name: str, *, low: int = 1, high: int = MOST) -> int:
    """A required whole number from `low` to `high`."""
    if name not in config:
        raise ValueError(f"{name} is missing from the model's config: {REMEDY}")
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_field(name, value, f"it must be a whole number from {low} to {high}; {REMEDY}")
    return value


def read_optional_integer(config: Mapping[str, Any], name: str, *, low: int = 1, high: int = MOST) -> int | None:
    """A whole number from `low` to `high`, or None when it is null or absent."""
    return None if config.get(name) is None else read_integer(config, name, low=low, high=high)


def read_number(config: Mapping[str, Any], name: str, *, default: float | None = None, low: float = 0.0) -> float:
    """A finite number above `low`; required unless there is a default."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"{name} is missing from the model's config: {REMEDY}")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= _LARGEST:
        raise bad_field(name, value, f"it must be a finite number above {low:g}; {REMEDY}")
    return float(value)


def read_optional_number(config: Mapping[str, Any], name: str) -> float | None:
    """A finite number from 0 on, or None when it is null or absent."""
    if config.get(name) is None:
        return None
    return 0.0 if config[name] == 0 and not isinstance(config[name], bool) else read_number(config, name)


def read_flag(config: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """True or false; null and absent mean the default."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_field(name, value, f"it must be true or false; {REMEDY}")
    return value


def read_mapping(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A nested object; null and absent mean an empty one."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise bad_field(name, value, f"it must be an object; {REMEDY}")
    return dict(value)


def read_architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names in transformers that the config gives; null and absent mean none."""
    names = config.get("architectures")
    if names is not None and (not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names)):
        raise bad_field("architectures", names, f"it must be a list of class names; {REMEDY}")
    return list(names or ())


def read_token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Token ids given as one number or a list; null and absent mean none."""
    value = config.get(name)
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MOST:
            raise bad_field(name, value, f"give whole numbers from 0 to {MOST}; {REMEDY}")
    return tuple(dict.fromkeys(ids))
