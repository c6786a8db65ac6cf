"""This node's folder of models fetched from remote stores.

Owns the cache's layout and its safety under several processes. Knows no model.
Invariant: a file under its own name is whole, and `.fetched.json` names only whole files, each with the remote stamp
it was fetched at. One process fetches at a time (a lock file); the others wait, then find the work done.

Environment variables:
| name | meaning | default |
|---|---|---|
| RAYDATA_LLM_CACHE | the folder that holds `models/` and `tokenizers/` | `~/.cache/raydata_llm` |
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from raydata_llm.redaction import masked_logger
from raydata_llm.remote_model import RemoteModel, wanted_files

logger = masked_logger(__name__)

# One S3 stream gives 100-250 MB/s: several at once fill a link, and 8 times 16 MiB is little memory.
_PARALLEL_READS = 8
_CHUNK_BYTES = 16 << 20
_MARKER = ".fetched.json"
_INCOMING = ".incoming"


def cache_folder(kind: str) -> Path:
    """The cache's folder for `kind` ("models" or "tokenizers"); it may not exist yet."""
    root = os.environ.get("RAYDATA_LLM_CACHE") or "~/.cache/raydata_llm"
    return Path(root).expanduser() / kind


def fetch_model(uri: str, *, weights: bool, load_format: str = "auto") -> str:
    """Bring a remote model to this node, as far as it is not there yet, and return its local path.

    Args:
        uri: A remote folder or `.gguf` file.
        weights: False fetches only what configs and tokenizers need (a GGUF file is always fetched whole).
        load_format: EngineConfig's, where a folder holds weights in several formats.

    Raises:
        ValueError: when the store or the cache folder cannot be used.
    """
    remote = RemoteModel(uri)
    folder = cache_folder("models") / _folder_name(uri)
    names = wanted_files(remote.files, weights=weights, load_format=load_format)
    if _missing(folder, remote, names):
        with locked(folder):
            _fetch(remote, folder, _missing(folder, remote, names))
    return str(folder / names[0]) if uri.endswith(".gguf") else str(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock file, against other processes of this node."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"RAYDATA_LLM_CACHE={str(folder.parents[1])!r} cannot be written: {error}; name a folder that can"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _folder_name(uri: str) -> str:
    stem = re.sub(r"[^\w.-]", "_", PurePosixPath(uri.partition("?")[0].rstrip("/")).name.removesuffix(".gguf"))
    return f"{stem}-{hashlib.blake2b(uri.rstrip('/').encode(), digest_size=6).hexdigest()}"


def _missing(folder: Path, remote: RemoteModel, names: list[str]) -> list[str]:
    stamps = _read_marker(folder)
    return [name for name in names if stamps.get(name) != _stamp(remote, name) or not (folder / name).exists()]


def _stamp(remote: RemoteModel, name: str) -> str:
    file = remote.files[name]
    return f"{file.size}/{file.stamp}"


def _read_marker(folder: Path) -> dict[str, str]:
    marker = folder / _MARKER
    return json.loads(marker.read_text())["files"] if marker.exists() else {}


def _fetch(remote: RemoteModel, folder: Path, names: list[str]) -> None:
    size = sum(remote.files[name].size for name in names)
    logger.info("Fetching %d files (%.1f MB) of %s to %s", len(names), size / 1e6, remote.uri, folder)
    incoming = folder / _INCOMING
    shutil.rmtree(incoming, ignore_errors=True)  # left by a process that was killed
    _download(remote, incoming, names)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(incoming / name, folder / name)
    shutil.rmtree(incoming, ignore_errors=True)
    _drop_removed(remote, folder, names)


def _drop_removed(remote: RemoteModel, folder: Path, fetched: list[str]) -> None:
    stamps = _read_marker(folder) | {name: _stamp(remote, name) for name in fetched}
    for name in stamps.keys() - remote.files.keys():
        (folder / name).unlink(missing_ok=True)
    kept = {name: stamp for name, stamp in stamps.items() if name in remote.files}
    written = folder / f"{_MARKER}.new"
    written.write_text(json.dumps({"uri": remote.uri, "files": kept}, indent=1))
    os.replace(written, folder / _MARKER)


def _download(remote: RemoteModel, folder: Path, names: list[str]) -> None:
    pool = ThreadPoolExecutor(_PARALLEL_READS)
    try:
        reads = []
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
            os.truncate(target, remote.files[name].size)
            for start in range(0, remote.files[name].size, _CHUNK_BYTES):
                reads.append(pool.submit(_copy_chunk, remote, name, target, start))
        for read in reads:
            read.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _copy_chunk(remote: RemoteModel, name: str, target: Path, start: int) -> None:
    length = min(_CHUNK_BYTES, remote.files[name].size - start)
    chunk = remote.read(name, start, length)
    if len(chunk) != length:
        raise ValueError(f"model_source={remote.uri!r} changed while {name} was read: start again")
    with target.open("r+b") as out:
        out.seek(start)
        out.write(chunk)
