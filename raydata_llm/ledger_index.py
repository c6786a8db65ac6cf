"""The keys of committed rows, sorted on local disk, and which of them this run has met again.

Memory is one bit a key and what the operating system caches of the file: keys are spread over buckets by their first
byte as they come, each bucket is sorted by itself, and lookups bisect the mapped file. Knows no store and no Ray.
Invariant: a committed key is taken as often as it was committed, never more.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

KEY_BYTES = 16
_KEY = np.dtype(f"S{KEY_BYTES}")
_BUCKETS = 256

Keys = np.ndarray[Any, np.dtype[np.bytes_]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class KeyIndex:
    """Built from chunks of concatenated keys, in any order; a key may be there several times."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="raydata_llm-keys-")  # noqa: SIM115 (lives as long)
        folder = Path(tempfile.mkdtemp(prefix="raydata_llm-buckets-"))
        try:
            self._sort_into_file(_spread(chunks, folder), folder)
        finally:
            shutil.rmtree(folder)
        self.size = self._file.tell() // KEY_BYTES
        self._keys: Keys = np.empty(0, _KEY)
        if self.size:
            self._file.flush()
            self._keys = np.memmap(self._file, _KEY, mode="r", shape=(self.size,))
        self._taken = np.zeros(self.size // 8 + 1, np.uint8)
        # Where the next free copy of a key is, for keys of which some copies are taken.
        self._next_free: dict[int, int] = {}

    def take(self, keys: bytes) -> Mask:
        """Take a committed copy for each key that has one left.

        Args:
            keys: Concatenated.

        Returns:
            For each key, whether it had one.
        """
        wanted: Keys = np.frombuffer(keys, _KEY)
        if not self.size or not wanted.size:
            return np.zeros(wanted.size, np.bool_)
        places = np.searchsorted(self._keys, wanted)
        found: Mask = self._keys[np.minimum(places, self.size - 1)] == wanted
        places = places[found]
        if np.unique(places).size == places.size and not (self._taken[places >> 3] >> (places & 7) & 1).any():
            np.bitwise_or.at(self._taken, places >> 3, (1 << (places & 7)).astype(np.uint8))
            return found
        found[found] = [self._take_copy(int(place)) for place in places]
        return found

    def _take_copy(self, first: int) -> bool:
        place = self._next_free.get(first, first)
        while place < self.size and self._keys[place] == self._keys[first]:
            is_taken = self._taken[place >> 3] >> (place & 7) & 1
            self._next_free[first] = place + 1
            if not is_taken:
                self._taken[place >> 3] |= 1 << (place & 7)
                return True
            place += 1
        return False

    def _sort_into_file(self, buckets: int, folder: Path) -> None:
        for bucket in range(buckets):
            keys: Keys = np.fromfile(folder / str(bucket), _KEY)
            keys.sort()
            keys.tofile(self._file)


def _spread(chunks: Iterable[bytes], folder: Path) -> int:
    """Write each key to the file of its first byte."""
    files = [(folder / str(bucket)).open("wb", buffering=1 << 14) for bucket in range(_BUCKETS)]
    for chunk in chunks:
        first_bytes = np.frombuffer(chunk, np.uint8)[::KEY_BYTES]
        keys: Keys = np.frombuffer(chunk, _KEY)[np.argsort(first_bytes, kind="stable")]
        ends = np.cumsum(np.bincount(first_bytes, minlength=_BUCKETS))
        for bucket, (start, end) in enumerate(zip(np.append(0, ends[:-1]), ends, strict=True)):
            files[bucket].write(keys[start:end].tobytes())
    for file in files:
        file.close()
    return _BUCKETS
