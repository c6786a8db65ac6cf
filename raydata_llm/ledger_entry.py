"""The keys of one file's rows in a form that proves itself, and a second copy of them inside Parquet files.

    keys, 16 bytes each | magic, version, number of keys, digest of all before it

A Parquet file carries the same bytes between its last column and its footer, a place that readers skip, so that an
entry which is lost or damaged can be made again from its file. Knows no store and no order of steps.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from raydata_llm.ledger_index import KEY_BYTES

_HEAD = struct.Struct("<8sIQ")
_MAGIC, _VERSION = b"RDLLMKEY", 1
_DIGEST_BYTES = 16
TRAILER_BYTES = _HEAD.size + _DIGEST_BYTES
_PARQUET_END = struct.Struct("<I4s")
_PARQUET_MAGIC = b"PAR1"


def seal(keys: bytes) -> bytes:
    """The bytes of an entry."""
    head = _HEAD.pack(_MAGIC, _VERSION, len(keys) // KEY_BYTES)
    digest = _new_digest()
    digest.update(keys)
    digest.update(head)
    return keys + head + digest.digest()


def unsealed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The keys of an entry that comes in pieces, as whole keys.

    Raises:
        ValueError: at the end, when the entry is not what was written; what came before it must not be used then.
    """
    digest, rest, count = _new_digest(), b"", 0
    for piece in pieces:
        rest += piece
        length = max(0, len(rest) - TRAILER_BYTES) // KEY_BYTES * KEY_BYTES
        keys, rest = rest[:length], rest[length:]
        digest.update(keys)
        count += length // KEY_BYTES
        if keys:
            yield keys
    head = rest[: _HEAD.size]
    digest.update(head)
    if head + digest.digest() != rest or _HEAD.unpack(head) != (_MAGIC, _VERSION, count):
        raise ValueError("the entry does not prove itself")


def add_to_parquet(content: pa.Buffer | bytes, keys: bytes) -> pa.Buffer:
    """A Parquet file that carries its rows' keys."""
    view = memoryview(content)
    footer = _footer_start(bytes(view[-_PARQUET_END.size :]), len(view))
    assert footer is not None, "it is a Parquet file"
    return pa.py_buffer(b"".join([view[:footer], seal(keys), view[footer:]]))


def keys_in_parquet(read: Callable[[int, int], bytes], size: int) -> bytes | None:
    """The keys that a Parquet file carries; None when it carries none, or is damaged.

    Args:
        read: Reads so many bytes from a place on.
        size: Of the file.
    """
    footer = _footer_start(read(max(0, size - _PARQUET_END.size), _PARQUET_END.size), size)
    if footer is None or footer < TRAILER_BYTES:
        return None
    trailer = read(footer - TRAILER_BYTES, TRAILER_BYTES)
    magic, _, count = _HEAD.unpack(trailer[: _HEAD.size])
    start = footer - TRAILER_BYTES - count * KEY_BYTES
    if magic != _MAGIC or start < 0:
        return None
    try:
        return b"".join(unsealed([read(start, count * KEY_BYTES), trailer]))
    except ValueError:
        return None


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _footer_start(end: bytes, size: int) -> int | None:
    if len(end) != _PARQUET_END.size:
        return None
    length, magic = _PARQUET_END.unpack(end)
    start = size - _PARQUET_END.size - length
    return int(start) if magic == _PARQUET_MAGIC and start >= len(_PARQUET_MAGIC) else None
