"""Reading the header of a safetensors file without torch.

Owns the format's header: 8 bytes of length, then JSON of name -> dtype, shape, data_offsets (counted from the header's
end). Knows no model.
Invariant: what `read_header` returns is wholly there; a file cut short is a ValueError.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from raydata_llm.engine.regular_file import open_regular, parse_json, shown
from raydata_llm.engine.shard import Cut, cut_shape

_ELEMENT_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
}
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
# NumPy and torch have no more.
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a weight file; `dtype` in the format's own name ("F32", "BF16", "Q4_1", ...)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor(TensorEntry):
    """A tensor in the file `path`.

    Args:
        start, end: Its bytes; those of a part by columns begin at `start` and end before `end`, with gaps.
        run: Bytes that lie together, and from one run's start to the next; None where all do.
    """

    path: Path
    start: int
    end: int
    run: tuple[int, int] | None = None


def cut_stored(stored: StoredTensor, cut: Cut | None) -> StoredTensor:
    """The part of a stored tensor: of a matrix, or of a vector."""
    if cut is None:
        return stored
    shape = cut_shape(stored.shape, cut)
    row_bytes = (stored.end - stored.start) // stored.shape[0]
    if cut.dim == 0:
        start, end = stored.start + cut.start * row_bytes, stored.start + cut.stop * row_bytes
        return dataclasses.replace(stored, shape=shape, start=start, end=end)
    element = row_bytes // stored.shape[1]
    start, run = stored.start + cut.start * element, (cut.stop - cut.start) * element
    end = start + (shape[0] - 1) * row_bytes + run
    return dataclasses.replace(stored, shape=shape, start=start, end=end, run=(run, row_bytes))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: when the file is cut short or no safetensors file.
    """
    with open_regular(path) as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 0 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise _broken(path, f"its {size} bytes do not hold a whole header")
        raw = file.read(length)
    try:
        header = parse_json(raw, unique=True)
    except ValueError as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, f"its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    entries = {name: _read_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_apart(path, entries)
    return entries


def _read_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"the header of {name[:120]} is garbled ({shown(entry)})")
    begin, end = offsets
    if begin > end or len(shape) > _MAX_DIMENSIONS:
        raise _broken(path, f"the header of {name[:120]} is garbled ({shown(entry)})")
    if data_start + end > size:
        raise _broken(path, f"{name[:120]} ends {data_start + end - size} bytes past the end of the file")
    element_size = _ELEMENT_SIZES.get(dtype)
    if element_size is not None and end - begin != element_size * math.prod(shape):
        raise _broken(path, f"{name[:120]} has {end - begin} bytes for {dtype} of shape {tuple(shape)}")
    return StoredTensor(dtype=dtype, shape=tuple(shape), path=path, start=data_start + begin, end=data_start + end)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # `type`, as JSON's true is an int too; the format counts in 64 bits.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_apart(path: Path, entries: dict[str, StoredTensor]) -> None:
    """Refuse tensors that share bytes."""
    taken = sorted((entry.start, entry.end, name) for name, entry in entries.items() if entry.end > entry.start)
    for (_, end, name), (start, _, other) in pairwise(taken):
        if start < end:
            raise _broken(path, f"{name[:120]} and {other[:120]} share bytes")


def _broken(path: Path, problem: str) -> ValueError:
    return ValueError(f"weight file {str(path)!r} is damaged or not a safetensors file: {problem}; download it again")
