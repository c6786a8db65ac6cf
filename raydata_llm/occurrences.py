"""How often each row was seen before in its job, so that identical rows draw different noise.

Owns 16 bytes a different row, in a file that is mapped and has no name: of ten million rows 160 to 320 MB, which the
system may write out. Rows are told apart by 64 bits of their digests: two that fall together (one chance in 10^5 for
ten million) are numbered as copies. Knows nothing of where rows run. Invariant: a block that comes again, as Ray
repeats tasks, gets the numbers that it got.
"""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Hashable
from typing import Any

import numpy as np

_FIRST_CAPACITY = 1 << 16

Numbers = np.ndarray[Any, np.dtype[np.uint64]]


class Occurrences:
    """Numbers of the rows of one job. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table = _mapped(_FIRST_CAPACITY)
        self._size = 0
        # Of rows that were seen more than once, and of the blocks that hold some: most jobs have few.
        self._copies: Counter[int] = Counter()
        self._answers: dict[Hashable, tuple[int, ...]] = {}

    def number(self, block: Hashable, digests: Numbers) -> tuple[int, ...]:
        """For each row, how many like it came before.

        Args:
            block: Which block asks; the same in a retry.
            digests: 64 bits of each row's digest.
        """
        with self._lock:
            if block not in self._answers:
                numbers = self._count(np.maximum(digests, np.uint64(1)))
                self._answers[block] = numbers if any(numbers) else ()
            return self._answers[block] or (0,) * len(digests)

    def _count(self, keys: Numbers) -> tuple[int, ...]:
        unique, first = np.unique(keys, return_index=True)
        is_new = np.zeros(len(keys), np.bool_)
        is_new[first] = self._insert(unique)
        numbers = []
        for key, new in zip(keys.tolist(), is_new.tolist(), strict=True):
            if not new:
                self._copies[key] += 1
            numbers.append(0 if new else self._copies[key])
        return tuple(numbers)

    def _insert(self, keys: Numbers) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Put different keys into the table; for each, whether it is new."""
        while 2 * (self._size + len(keys)) > len(self._table):
            self._grow()
        is_new = _insert(self._table, keys)
        self._size += int(is_new.sum())
        return is_new

    def _grow(self) -> None:
        old = self._table
        self._table = _mapped(2 * len(old))
        for start in range(0, len(old), _FIRST_CAPACITY):
            part = old[start : start + _FIRST_CAPACITY]
            _insert(self._table, part[part != 0])


def _insert(table: Numbers, keys: Numbers) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Open addressing, all keys a step at a time; 0 is an empty place, and keys are different."""
    mask = np.uint64(len(table) - 1)
    is_new = np.zeros(len(keys), np.bool_)
    open_keys = np.arange(len(keys))
    places = keys & mask
    while open_keys.size:
        wanted = keys[open_keys]
        found = table[places]
        is_known = found == wanted
        empty = found == 0
        table[places[empty]] = wanted[empty]
        # Of several that took one place, the last is there; the others go on.
        took = empty & (table[places] == wanted)
        is_new[open_keys[took]] = True
        goes_on = ~(took | is_known)
        open_keys, places = open_keys[goes_on], (places[goes_on] + np.uint64(1)) & mask
    return is_new


def _mapped(capacity: int) -> Numbers:
    file = tempfile.TemporaryFile(prefix="raydata_llm-rows-")  # noqa: SIM115 (the map keeps it)
    file.truncate(capacity * 8)
    return np.memmap(file, np.uint64, mode="r+", shape=(capacity,))
