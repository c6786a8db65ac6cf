"""Credentials, taken out of any text that leaves a process: messages, reprs, progress lines, reports, metrics.

Owns what counts as a credential: the values of environment variables with telling names (the process's and those of a
`runtime_env`), and what stands where addresses carry secrets. Knows nothing of where a text goes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "***"

# Not PWD, the working directory; not max_tokens or TOKENIZERS_PARALLELISM.
_TELLING_NAME = re.compile(
    r"SECRET|TOKEN(?!S|I)|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|ACCOUNT_?KEY|CONNECTION_STRING"
    r"|(^|_)SAS(_|$)|_PWD$",
    re.I,
)
# Where addresses carry secrets: s3://key:secret@bucket, and query parameters such as secret_key= or X-Amz-Signature=.
# A key with a slash in it makes no address, and is in the message that says so; what follows a port is a path.
_USER_INFO = re.compile(r"(?<=://)([^/\s'\"@?]+|[^/\s'\"@?:]+:(?!\d{1,5}/)[^\s'\"@?]+)@")
_QUERY_SECRET = re.compile(
    r"(?P<name>[?&][\w.-]*(?:secret|token|passw|credential|key|signature|\bsig\b)[\w.-]*=)[^&\s'\"]+", re.I
)
# Shorter values ("1", "true") are in every text.
_SHORTEST = 6


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without credentials.

    Args:
        text: Anything that is shown or written.
        secrets: Values that are masked beside those of the process's own environment.
    """
    # Long ones first: one secret may begin with another.
    for value in sorted({*secrets, *secret_values(os.environ)} - {""}, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _USER_INFO.sub(f"{MASK}@", text)
    return _QUERY_SECRET.sub(rf"\g<name>{MASK}", text)


def redact_tree(value: Any, secrets: Sequence[str] = ()) -> Any:
    """A nested value with every text redacted, and what stands under a telling name masked."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        return {name: _redact_entry(name, entry, secrets) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(entry, secrets) for entry in value]
    return value


def is_telling(name: object) -> bool:
    """Whether a value under this name is a credential, by the name."""
    return _TELLING_NAME.search(str(name)) is not None


def shown(name: object, value: Any) -> str:
    """A setting's value as messages show it."""
    return repr(_redact_entry(name, value, ()))


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of variables with telling names."""
    return [value for name, value in environment.items() if is_telling(name) and len(value) >= _SHORTEST]


def mask_environment(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A `runtime_env` to be shown: the names of its variables, none of their values."""
    if not runtime_env or not isinstance(runtime_env.get("env_vars"), Mapping):
        return runtime_env
    return {**runtime_env, "env_vars": dict.fromkeys(runtime_env["env_vars"], MASK)}


class HiddenVariables(dict[str, str]):
    """Environment variables that show their names alone, for libraries that log whatever they are given."""

    def __repr__(self) -> str:
        return repr(dict.fromkeys(self, MASK))

    __str__ = __repr__


def hide_environment(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """A `runtime_env` to be used: complete, its variables' values hidden from whoever shows it."""
    if not isinstance(runtime_env.get("env_vars"), Mapping):
        return dict(runtime_env)
    return {**runtime_env, "env_vars": HiddenVariables(runtime_env["env_vars"])}


def _redact_entry(name: object, entry: Any, secrets: Sequence[str]) -> Any:
    return _masked(entry) if is_telling(name) else redact_tree(entry, secrets)


def _masked(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {name: _masked(inner) for name, inner in entry.items()}
    if isinstance(entry, (list, tuple)):
        return [_masked(inner) for inner in entry]
    # A number under such a name ("stop_token_ids", "seed") is none.
    return MASK if isinstance(entry, (str, bytes)) else entry
