"""Tells one model from another by what lies in its files, wherever they were copied to.

Small files count whole, weights by their size and by samples of a few hundred kB: a fine-tune moves weights everywhere,
and reading a hundred GB on the driver would cost minutes. Knows no engine and loads no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from raydata_llm.model_source import is_remote, resolve_model
from raydata_llm.remote_model import RemoteModel, wanted_files

_WHOLE_BYTES = 1 << 20
_SAMPLES = 8
_SAMPLE_BYTES = 1 << 14


def model_fingerprint(model_source: str, *, load_format: str) -> str:
    """32 hex digits that differ for models that would answer differently.

    Args:
        model_source: A local folder or GGUF file, a Hub id, or a remote folder or GGUF file.
        load_format: The engine's.

    Raises:
        ValueError: when there is nothing to read there.
    """
    weights = load_format != "dummy"
    if is_remote(model_source):
        remote = RemoteModel(model_source)
        names = wanted_files(remote.files, weights=weights, load_format=load_format)
        return _digest({name: remote.files[name].size for name in names}, remote.read)
    path = Path(resolve_model(model_source, weights=False))
    if path.parent.name == "snapshots":  # of the Hub: the folder is named by the revision
        return hashlib.blake2b(path.name.encode(), digest_size=16).hexdigest()
    if path.is_file():
        return _digest({"": path.stat().st_size}, lambda _, start, length: _read(path, start, length))
    files = {str(found.relative_to(path)): found.stat().st_size for found in path.rglob("*") if found.is_file()}
    names = wanted_files(files, weights=weights, load_format=load_format)
    return _digest({name: files[name] for name in names}, lambda name, start, length: _read(path / name, start, length))


def _digest(sizes: dict[str, int], read: Callable[[str, int, int], bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, size in sorted(sizes.items()):
        digest.update(f"{name} {size}\n".encode())
        for start, length in _pieces(size):
            digest.update(read(name, start, length))
    return digest.hexdigest()


def _pieces(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE_BYTES:
        return [(0, size)]
    last = size - _SAMPLE_BYTES
    return [(last * number // (_SAMPLES - 1), _SAMPLE_BYTES) for number in range(_SAMPLES)]


def _read(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)
