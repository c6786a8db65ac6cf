"""Credentials, taken out of any text that leaves a process: messages, reprs, progress lines, reports, metrics.

Owns what counts as a credential: the values of environment variables with telling names (the process's and those of a
`runtime_env`), and what stands where addresses carry secrets. Knows nothing of where a text goes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_TELLING_NAME = re.compile(
    r"SECRET|TOKEN|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|ACCOUNT_KEY|SAS|(^|_)PWD$", re.I
)
# Where addresses carry secrets: s3://key:secret@bucket, and query parameters such as secret_key= or X-Amz-Signature=.
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"@?]+@")
_QUERY_SECRET = re.compile(
    r"(?P<name>[?&][\w.-]*(?:secret|token|passw|credential|key|signature|\bsig\b)[\w.-]*=)[^&\s'\"]+", re.I
)
# Shorter values ("1", "true") are in every text.
_SHORTEST = 6


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without credentials.

    Args:
        text: Anything that is shown or written.
        environment: Variables whose secret values are masked too, beside the process's own.
    """
    for value in _secret_values({**os.environ, **(environment or {})}):
        text = text.replace(value, MASK)
    text = _USER_INFO.sub(f"{MASK}@", text)
    return _QUERY_SECRET.sub(rf"\g<name>{MASK}", text)


def redact_tree(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A nested value with every text redacted, and what stands under a telling name masked."""
    if isinstance(value, str):
        return redact(value, environment)
    if isinstance(value, Mapping):
        return {name: _redact_entry(name, entry, environment) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(entry, environment) for entry in value]
    return value


def mask_environment(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A `runtime_env` to be shown: the names of its variables, none of their values."""
    if not runtime_env or not isinstance(runtime_env.get("env_vars"), Mapping):
        return runtime_env
    return {**runtime_env, "env_vars": dict.fromkeys(runtime_env["env_vars"], MASK)}


def _redact_entry(name: object, entry: Any, environment: Mapping[str, str] | None) -> Any:
    # A number under such a name ("max_tokens", "seed") is none.
    if isinstance(entry, str) and _TELLING_NAME.search(str(name)):
        return MASK
    return redact_tree(entry, environment)


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    found = {value for name, value in environment.items() if _TELLING_NAME.search(name) and len(value) >= _SHORTEST}
    # Long ones first: one secret may begin with another.
    return sorted(found, key=len, reverse=True)
