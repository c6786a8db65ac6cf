"""The values of request parameters, read as users, JSON, Arrow and NumPy hand them over.

Owns the wording of what is wrong with a value, and how much of one is looked at: a list of a million token ids is read
in C, and an error never repeats more than a line of it. Knows no parameter but by its name.
Invariant: a value that is returned has the type asked for; anything else is a ValueError with field, value, remedy.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from decimal import Decimal
from typing import Any

import numpy as np

# Slot arrays and kernels count in 32 bits. No model has so long a context or so large a vocabulary: a count beyond it
# means the same as this one.
LARGEST_COUNT = 2**31 - 1
# Entries of a list of token ids at most.
MOST_TOKEN_IDS = 1 << 20
# What float32 holds: the engine computes with it.
_LARGEST_FLOAT, _SMALLEST_FLOAT = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_NUMBERS = (int, float, np.number, Decimal)


class _Shortened(reprlib.Repr):
    """Values of any size in a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = self.maxarray = 16
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write integers of more than 4,300 digits."""
        return repr(x) if x.bit_length() <= 256 else f"<an integer of {x.bit_length()} bits>"


def shown(value: object) -> str:
    """A value for an error's text: as `repr`, but never long, and never failing."""
    return _Shortened().repr(value)


def invalid(name: str, value: object, remedy: str) -> ValueError:
    """The error of a field."""
    return ValueError(f"{name}={shown(value)} is not valid: {remedy}")


def whole_number(value: Any) -> int | None:
    """What a value says if it is a whole number; None for anything else.

    Arrow and JSON hand whole numbers over as 5.0, NumPy scalars, arrays without dimensions or decimals; they are taken
    for what they mean. True and False are no numbers.
    """
    if type(value) is int:
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_, np.ndarray)):
        return None
    if isinstance(value, (float, np.floating)):
        return int(value) if float(value).is_integer() else None
    if isinstance(value, Decimal):
        # One of 10**9 digits would be written out.
        is_whole = value.is_finite() and value.adjusted() < 40 and value == value.to_integral_value()
        return int(value) if is_whole else None
    try:
        return operator.index(value)
    except Exception:  # any object may have an `__index__`, and anything may come out of it
        return None


def read_integer(name: str, value: Any, *, optional: bool) -> int | None:
    """A whole number, or None where that is allowed."""
    if value is None and optional:
        return None
    number = whole_number(value)
    if number is None:
        raise invalid(name, value, f"give a whole number{' or None' if optional else ''}")
    return number


def read_count(name: str, value: Any, *, optional: bool) -> int | None:
    """A whole number of things: what is more than any model has, as `LARGEST_COUNT`."""
    number = read_integer(name, value, optional=optional)
    return None if number is None else min(number, LARGEST_COUNT)


def read_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`; of those that float32 does not hold, 0 for one that is too small."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_, np.ndarray, str, bytes)) or not hasattr(value, "__float__"):
        raise invalid(name, value, "give a number")
    try:
        number = float(value)
    except Exception as error:  # an integer of 400 digits, a decimal that is none, and any object's own `__float__`
        raise invalid(name, value, "give a number") from error
    high = min(high, _LARGEST_FLOAT)
    if not low <= number <= high:
        raise invalid(name, value, f"give a number from {low:g} to {high:g}")
    return number if abs(number) >= _SMALLEST_FLOAT else 0.0


def read_flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too; anything else is refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise invalid(name, value, "give True or False")
    return bool(value)


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


def read_strings(name: str, value: Any, *, most: int, most_characters: int) -> tuple[str, ...]:
    """A string or several, none of them empty; None is none.

    Args:
        most: How many, each counted once.
        most_characters: Of all together.
    """
    if value is None:
        return ()
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Iterable) or isinstance(given, (bytes, Mapping)):
        raise invalid(name, value, "give non-empty strings")
    strings: list[Any] = given.tolist() if isinstance(given, np.ndarray) else list(given)
    if not all(isinstance(string, str) and string for string in strings):
        raise invalid(name, value, "give non-empty strings")
    for string in strings:
        check_text(name, string)
    strings = list(dict.fromkeys(strings))
    length = sum(map(len, strings))
    if len(strings) > most or length > most_characters:
        raise ValueError(
            f"{name} has {len(strings):,} strings of {length:,} characters together: give at most {most:,}, of at most "
            f"{most_characters:,} characters"
        )
    return tuple(strings)


def read_token_ids(name: str, value: Any, *, least: int = 0) -> tuple[int, ...]:
    """Token ids, `least` or more each, in 31 bits."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise invalid(name, value, "give a list of token ids")
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise invalid(name, value, "give a list of token ids")
    if isinstance(value, (Sized, np.ndarray)) and len(value) > MOST_TOKEN_IDS:
        raise ValueError(f"{name} has {len(value):,} token ids: give at most {MOST_TOKEN_IDS:,}")
    given: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    token_ids = given if set(map(type, given)) <= {int} else [_token_id(name, value, one) for one in given]
    if token_ids and not (least <= min(token_ids) and max(token_ids) <= LARGEST_COUNT):
        raise invalid(name, value, f"token ids are {least} or more, and below 2**31")
    return tuple(token_ids)


def _token_id(name: str, value: Any, one: Any) -> int:
    number = whole_number(one)
    if number is None:
        raise invalid(name, value, "give a list of token ids (whole numbers)")
    return number


def read_ids_or_rows(value: Any) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """The value of `prompt_logprob_token_ids`: token ids, or rows of them that are filled up with -1."""
    name = "prompt_logprob_token_ids"
    given = value.tolist() if hasattr(value, "tolist") else value
    entries = [] if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)) else list(given)
    if not entries:
        raise invalid(name, value, "name at least one token")
    if not all(isinstance(entry, Sequence) or getattr(entry, "ndim", 0) for entry in entries):
        return read_token_ids(name, entries)
    return tuple(read_token_ids(name, entry, least=-1) for entry in entries)


def read_bias(value: Any) -> dict[int, float]:
    """The value of `logit_bias`: token id -> what is added to its logit."""
    name = "logit_bias"
    if not isinstance(value, Mapping):
        raise invalid(name, value, "map token ids to numbers")
    if len(value) > MOST_TOKEN_IDS:
        raise ValueError(f"{name} has {len(value):,} token ids: give at most {MOST_TOKEN_IDS:,}")
    # JSON makes strings of integer keys.
    try:
        bias = {_bias_key(token_id): float(amount) for token_id, amount in value.items()}
    except (ArithmeticError, TypeError, ValueError) as error:
        raise invalid(name, value, "map token ids to numbers") from error
    if not all(0 <= token_id <= LARGEST_COUNT and abs(amount) <= _LARGEST_FLOAT for token_id, amount in bias.items()):
        remedy = f"map token ids (0 or more, and below 2**31) to numbers up to {_LARGEST_FLOAT:g}"
        raise invalid(name, value, remedy)
    return bias


def _bias_key(given: Any) -> int:
    number = int(given) if isinstance(given, str) else whole_number(given)
    if number is None:
        raise TypeError("no whole number")
    return number
