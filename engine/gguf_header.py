"""Reading the header of a GGUF file: its metadata and where its tensors lie.

Owns the binary format, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows no model.
It is read here because the gguf package's GGUFReader makes an array view of every token of the vocabulary: 4.0 s on
SmolLM2's 49152 tokens, 0.1 s here. The sizes of quantised blocks come from that package, imported when needed.
Invariant: the tensors of a header lie wholly inside the file; a file cut short is a ValueError.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydata_llm.engine.regular_file import open_regular, shown

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
# Far above any known file: the largest have 5,000 tensors, 100 fields, 256,000 tokens, and a template of 20 kB.
_MAX_ENTRIES = 1 << 20
_MAX_ITEMS = 1 << 24
_MAX_STRING_BYTES = 1 << 24
_MAX_HEADER_BYTES = 1 << 28
_MAX_SIZE = 1 << 40


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: llama.cpp's type name ("Q4_1"), its shape with rows first, and its bytes `start` to `end`."""

    type_name: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors; of an array of strings (the vocabulary) only its length is kept."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ValueError: when the file is cut short, no GGUF file, or of a version or tensor type that is not known.
    """
    with open_regular(path) as file:
        size = path.stat().st_size
        if size < 24:
            raise _broken(path, f"it has only {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)


def _read(path: Path, data: mmap.mmap) -> GgufHeader:
    try:
        return _Reader(path, data).read_header()
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise _broken(path, f"its header ends too early or is garbled ({error})") from error


def _broken(path: Path, problem: str) -> ValueError:
    return ValueError(f"weight file {str(path)!r} is damaged or not a GGUF file: {problem}; download it again")


class _Reader:
    """A cursor over the file's bytes."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._offset = 0
        self._num_items = 0

    def read_header(self) -> GgufHeader:
        magic, version, num_tensors, num_fields = self._unpack("<4sIQQ")
        if magic != b"GGUF":
            raise _broken(self._path, f"it begins with {magic!r}")
        if version not in (2, 3):
            raise _broken(self._path, f"its version {version} is not 2 or 3 (little-endian)")
        for count, kind in ((num_tensors, "tensors"), (num_fields, "fields")):
            if count > _MAX_ENTRIES:
                raise _broken(self._path, f"its header counts {count} {kind}")
        metadata = {self._read_string(): self._read_value(self._unpack("<I")[0]) for _ in range(num_fields)}
        infos = [self._read_tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise _broken(self._path, f"general.alignment is {shown(alignment)}")
        if len({info[0] for info in infos}) < len(infos):
            raise _broken(self._path, "its header names a tensor twice")
        start = -(-self._offset // alignment) * alignment
        return GgufHeader(metadata, {info[0]: self._locate(start, *info) for info in infos})

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._offset)
        self._offset += struct.calcsize(layout)
        return values

    def _skip(self, num_bytes: int) -> int:
        """Pass over bytes that must be there; returns where they began."""
        begin = self._offset
        if num_bytes > len(self._data) - begin:
            raise struct.error(f"{num_bytes} bytes wanted at {begin} of {len(self._data)}")
        self._offset += num_bytes
        if self._offset > _MAX_HEADER_BYTES:
            raise _broken(self._path, f"its header has more than {_MAX_HEADER_BYTES >> 20} MiB")
        return begin

    def _read_string(self) -> str:
        (length,) = self._unpack("<Q")
        if length > _MAX_STRING_BYTES:
            raise _broken(self._path, f"its header has a text of {length} bytes")
        begin = self._skip(length)
        return self._data[begin : begin + length].decode("utf-8")

    def _read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._read_string()
        if kind == _ARRAY:
            item_kind, length = self._unpack("<IQ")
            return self._read_array(item_kind, length)
        if kind not in _SCALARS:
            raise _broken(self._path, f"its header has a value of unknown type {kind}")
        return self._unpack("<" + _SCALARS[kind])[0]

    def _read_array(self, kind: int, length: int) -> Any:
        self._num_items += length
        if self._num_items > _MAX_ITEMS:
            raise _broken(self._path, f"its header has arrays of {self._num_items} items")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._unpack("<Q")[0])
            return length
        if kind not in _SCALARS:
            raise _broken(self._path, f"its header has an array of unknown type {kind}")
        layout = "<" + _SCALARS[kind]
        begin = self._skip(length * struct.calcsize(layout))
        return [value for (value,) in struct.iter_unpack(layout, self._data[begin : self._offset])]

    def _read_tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._read_string()
        (num_dimensions,) = self._unpack("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise _broken(self._path, f"{name[:120]} has {num_dimensions} dimensions")
        dimensions = self._unpack(f"<{num_dimensions}Q")
        if not all(1 <= size <= _MAX_SIZE for size in dimensions):
            raise _broken(self._path, f"{name[:120]} is of shape {dimensions[::-1]}")
        kind, offset = self._unpack("<IQ")
        return name, tuple(reversed(dimensions)), kind, offset

    def _locate(self, data_start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        type_name, block_size, type_size = _type_of(self._path, name, kind)
        if shape[-1] % block_size:
            raise _broken(
                self._path, f"{name[:120]} has rows of {shape[-1]}, no multiple of {type_name}'s {block_size}"
            )
        start = data_start + offset
        end = start + math.prod(shape) // block_size * type_size
        if end > len(self._data):
            raise _broken(self._path, f"{name[:120]} ends {end - len(self._data)} bytes past the end of the file")
        return GgufTensor(type_name=type_name, shape=shape, start=start, end=end)


def _type_of(path: Path, name: str, kind: int) -> tuple[str, int, int]:
    """Name, elements and bytes of a block of a tensor type."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"model={str(path)!r} is a GGUF file, which needs the gguf package: pip install 'raydata-llm[gguf]'"
        ) from error
    try:
        quantization = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise _broken(path, f"{name[:120]} is of type {kind}, unknown to the gguf package") from error
    block_size, type_size = gguf.GGML_QUANT_SIZES[quantization]
    return quantization.name, block_size, type_size
