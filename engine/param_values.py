"""The values of request parameters, read as users, JSON and Arrow hand them over.

Owns the wording of what is wrong with a value. Knows no parameter but by its name.
Invariant: a value that is returned has the type asked for; anything else is a ValueError with field, value, remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def read_integer(name: str, value: Any, *, optional: bool) -> int | None:
    """A whole number, or None where that is allowed."""
    # Arrow and JSON hand integers over as 5.0 or numpy scalars; a whole number is taken for what it means.
    if value is None and optional:
        return None
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f"{name}={value!r} is not valid: give a whole number{' or None' if optional else ''}")


def read_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name}={value!r} is not valid: give a number")
    number = float(value)
    if not low <= number <= high or math.isinf(number):
        raise ValueError(f"{name}={value!r} is not valid: give a number from {low:g} to {high:g}")
    return number


def check_text(name: str, text: str) -> None:
    """Refuse text with half a character (a lone surrogate), which has no bytes and no tokens."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        about = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{name} has half a character (a lone surrogate) at {error.start}: {about!r}; leave it out, as "
            "text.encode(errors='replace').decode() does"
        ) from None


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not valid: give True or False")


def read_strings(name: str, value: Any) -> tuple[str, ...]:
    """A string or several, none of them empty; None is none."""
    given = () if value is None else (value,) if isinstance(value, str) else value
    strings = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"{name}={value!r} is not valid: give non-empty strings")
    for string in strings:
        check_text(name, string)
    return strings


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, 0 or more each."""
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} is not valid: give a list of token ids")
    token_ids = tuple(read_integer(name, token_id, optional=False) or 0 for token_id in value)
    if any(token_id < 0 for token_id in token_ids):
        raise ValueError(f"{name}={value!r} is not valid: token ids are 0 or more")
    return token_ids


def read_ids_or_rows(value: Any) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """The value of `prompt_logprob_token_ids`: token ids, or rows of them that are filled up with -1."""
    name = "prompt_logprob_token_ids"
    given = value.tolist() if hasattr(value, "tolist") else value
    entries = [] if not isinstance(given, Iterable) or isinstance(given, str) else list(given)
    if not entries:
        raise ValueError(f"{name}={value!r} is not valid: name at least one token")
    if not all(isinstance(entry, Sequence) or hasattr(entry, "tolist") for entry in entries):
        return read_token_ids(name, entries)
    rows = tuple(tuple(read_integer(name, token_id, optional=False) or 0 for token_id in entry) for entry in entries)
    if any(token_id < -1 for row in rows for token_id in row):
        raise ValueError(f"{name} names tokens below -1: token ids are 0 or more, and -1 fills rows up")
    return rows


def read_bias(value: Mapping[Any, Any]) -> dict[int, float]:
    """The value of `logit_bias`: token id -> what is added to its logit."""
    # JSON makes strings of integer keys.
    try:
        bias = {int(token_id): float(amount) for token_id, amount in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"logit_bias={value!r} is not valid: map token ids to numbers") from error
    if any(token_id < 0 or not math.isfinite(amount) for token_id, amount in bias.items()):
        raise ValueError(f"logit_bias={value!r} is not valid: map token ids (0 or more) to finite numbers")
    return bias
