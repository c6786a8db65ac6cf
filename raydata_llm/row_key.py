"""What tells rows apart: a digest of what a row says, not of where or when it runs.

Which noise a row draws follows from it, and what a job that is resumed knows it by. Invariant: the same row has the
same digest in every process and every run.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np


def row_digest(row: Mapping[str, Any]) -> bytes:
    """A 16-byte digest of a row's values, equal for equal rows in any process."""
    try:
        text = json.dumps(_alone(row), sort_keys=True, default=_plain).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError):  # keys of several types, or a value that holds itself
        text = str(_by_pickle(row)).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def _alone(value: Any) -> Any:
    """The value without what the rows beside it do to it.

    Arrow fills in other rows' columns and fields with None, and makes floats of whole numbers beside which one is none;
    which rows lie together differs from run to run.
    """
    kind = type(value)
    if kind is dict:
        return {name: _alone(entry) for name, entry in value.items() if entry is not None}
    if kind is float:
        return int(value) if value.is_integer() else value
    # Of one type, as Arrow has them: long lists of token ids stay as they are.
    if (kind is list or kind is tuple) and value and type(value[0]) not in (int, str):
        return [_alone(entry) for entry in value]
    return value


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return value.tolist()
        return [str(value.dtype), value.shape, _hash(np.ascontiguousarray(value).tobytes())]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _hash(bytes(value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return _by_pickle(value)


def _by_pickle(value: object) -> list[str]:
    try:
        return [type(value).__qualname__, _hash(pickle.dumps(value, protocol=5))]
    except (pickle.PicklingError, AttributeError, TypeError):
        return [type(value).__qualname__]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
