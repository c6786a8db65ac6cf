"""What tells rows apart: a digest of what a row says, not of where or when it runs.

Which noise a row draws follows from it, and what a job that is resumed knows it by. Invariant: the same row has the
same digest in every process and every run, beside whichever rows it lies.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from raydata_llm.arrow_values import alone


def row_digest(row: Mapping[str, Any]) -> bytes:
    """A 16-byte digest of a row's values, equal for equal rows in any process."""
    try:
        text = json.dumps(alone(dict(row)), sort_keys=True, default=_plain).encode("utf-8", "surrogatepass")
    except Exception:  # keys of several types, a value that holds itself, an object that refuses to be written
        text = str(_by_pickle(row)).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


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
    except Exception:  # objects may refuse in any way, and nesting may be too deep
        return [type(value).__qualname__]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
