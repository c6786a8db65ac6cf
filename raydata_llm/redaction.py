"""Settings as they may be shown: without credentials, and without the variables of a `runtime_env`.

Owns what of a setting is seen. What counts as a credential, and the ways out that all rooms share, are the engine's
(`engine/redaction.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydata_llm.engine.redaction import (
    MASK,
    is_telling,
    mask_error,
    masked_errors,
    masked_logger,
    redact,
    redact_entry,
    redact_tree,
)
from raydata_llm.engine.secret_values import secret_values

__all__ = [
    "MASK",
    "HiddenVariables",
    "hide_environment",
    "is_telling",
    "mask_environment",
    "mask_error",
    "masked_errors",
    "masked_logger",
    "redact",
    "redact_entry",
    "redact_tree",
    "secret_values",
    "shown",
]


def shown(name: object, value: Any) -> str:
    """A setting's value as messages show it."""
    return repr(redact_entry(name, value))


def mask_environment(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A `runtime_env` to be shown: the names of its variables, none of their values."""
    if not runtime_env:
        return runtime_env
    shown_env: Mapping[str, Any] = redact_tree(runtime_env)
    return shown_env


class HiddenVariables(dict[str, str]):
    """Environment variables that show their names alone, for whoever logs what they are given: a dict in all else."""

    def __repr__(self) -> str:
        return repr(dict.fromkeys(self, MASK))

    __str__ = __repr__


def hide_environment(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """A `runtime_env` to be used: complete, its variables' values hidden from whoever shows it."""
    if not isinstance(runtime_env.get("env_vars"), Mapping):
        return dict(runtime_env)
    return {**runtime_env, "env_vars": HiddenVariables(runtime_env["env_vars"])}
