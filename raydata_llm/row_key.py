"""Which sampling noise a row draws: decided by what the row says, not by where or when it runs.

Invariant: the same row of the same dataset gets the same key on every replica, in every retry and in every run;
identical rows get different ones.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raydata_llm.engine.request import sampling_key


def row_digest(row: Mapping[str, Any]) -> bytes:
    """A 16-byte digest of a row's values, equal for equal rows in any process."""
    try:
        text = json.dumps(row, sort_keys=True, default=_plain).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):  # keys of several types, or a value that holds itself
        text = str(_by_pickle(row)).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def sampling_keys(digests: Sequence[bytes], *, job_seed: int, block_number: int) -> list[int]:
    """The noise keys of one block's rows.

    Args:
        digests: The rows' digests, in order.
        job_seed: The engine's seed.
        block_number: The block's number in its dataset. It only counts where the block repeats a row: copies are
            interchangeable, so it does not matter which copy gets which key, only that all get different ones.
    """
    copies = Counter(digests)
    seen: Counter[bytes] = Counter()
    keys = []
    for digest in digests:
        occurrence = seen[digest] + ((block_number + 1) << 32 if copies[digest] > 1 else 0)
        seen[digest] += 1
        keys.append(sampling_key(job_seed, digest, occurrence))
    return keys


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
