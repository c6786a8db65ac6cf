"""A model's files in a remote store, such as `s3://bucket/folder` or `gs://bucket/model.gguf`: listed and read.

Owns what of a model's folder is worth reading, and what a store's failure means to the user. Knows no cache.
pyarrow's own file systems come first (no extra package, and they fail loudly on a missing bucket), fsspec's after.
Importing this reads no store and imports no file system.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from raydata_llm.redaction import redact
from raydata_llm.store_address import check_bucket

_METADATA_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_TEMPLATE_FOLDER = "additional_chat_templates"
# Of sentence-transformers' modules, such as 1_Pooling and 2_Dense.
_MODULE_FOLDER = re.compile(r"[1-9]\d*_\w+")
_CREDENTIAL_ERRORS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE",
    "INVALID_CLIENT_TOKEN",
    "EXPIRED",
    "Forbidden",
    "OAuth2 access token",
)


_HUB_ADDRESS = re.compile(r"(hf://|https?://(huggingface\.co|hf\.co)/)(models/)?(?P<id>[\w.-]+/[\w.-]+)")
# pyarrow's client of Google's store goes on for 15 minutes without a network or credentials.
_GCS_SECONDS = 20


@dataclass(frozen=True)
class RemoteFile:
    """One file: its path in the store, its size in bytes, and a stamp that changes when it is overwritten."""

    path: str
    size: int
    stamp: str


class RemoteModel:
    """The files of a remote model; `uri` is its address without credentials.

    Args:
        uri: A folder, or a `.gguf` file.

    Raises:
        ValueError: naming the URI, what went wrong and the remedy.
    """

    def __init__(self, uri: str) -> None:
        self.uri = redact(uri)
        self._filesystem, path = _open_filesystem(uri)
        try:
            self.files = {name: self._remote_file(info) for name, info in self._list(path).items()}
        except OSError as error:
            raise _store_error(self.uri, error) from error
        if not self.files:
            raise ValueError(
                f"model_source={self.uri!r} not found: there is no file at that place; check the folder's name"
            )

    def read(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes (fewer at the file's end) from position `start`."""
        try:
            with self._filesystem.open_input_file(self.files[name].path) as stream:
                stream.seek(start)
                content: bytes = stream.read(length)
        except OSError as error:
            raise _store_error(self.uri, error) from error
        return content

    def _list(self, path: str) -> dict[str, Any]:
        from pyarrow.fs import FileSelector, FileType

        if path.endswith(".gguf"):
            info = self._filesystem.get_file_info(path)
            return {PurePosixPath(path).name: info} if info.type == FileType.File else {}
        found, folders = {}, [""]
        for folder in folders:
            selector = FileSelector(f"{path.rstrip('/')}/{folder}".rstrip("/"))
            for info in self._filesystem.get_file_info(selector):
                if info.type == FileType.File:
                    found[folder + info.base_name] = info
                elif not folder and _is_read(info.base_name):
                    folders.append(f"{info.base_name}/")
        return found

    def _remote_file(self, info: Any) -> RemoteFile:
        # pyarrow tells no etag; the modification time changes with every overwrite. fsspec's stores tell a key.
        handler = getattr(self._filesystem, "handler", None)
        stamp = str(info.mtime_ns) if handler is None else str(handler.fs.ukey(info.path))
        return RemoteFile(path=info.path, size=info.size, stamp=stamp)


def wanted_files(names: Iterable[str], *, weights: bool, load_format: str = "auto") -> list[str]:
    """Choose from a model folder's files what the engine reads.

    Left out are notes and pictures, weights in a second format (`.bin` beside `.safetensors`), Mistral's
    `consolidated` copy, and subfolders such as `original/` that are not sentence-transformers' modules; a GGUF file
    counts only when it is named itself.
    """
    # A store may call a file `../x`, which would be written outside the folder.
    names = sorted(name for name in names if ".." not in name.split("/"))
    if len(names) == 1 and names[0].endswith(".gguf"):
        return names
    folders = {name.partition("/")[0] for name in names if name.count("/") == 1}
    read = [folder for folder in sorted(folders) if _is_read(folder)]
    chosen = [name for name in names if ("/" not in name or name.partition("/")[0] in read) and _is_metadata(name)]
    if not weights:
        return chosen
    for folder in ("", *(f"{folder}/" for folder in read)):
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        chosen += [folder + name for name in weight_files((n for n in inside if "/" not in n), load_format)]
    return chosen


def _is_read(folder: str) -> bool:
    return folder == _TEMPLATE_FOLDER or _MODULE_FOLDER.fullmatch(folder) is not None


def _is_metadata(name: str) -> bool:
    return name.endswith(_METADATA_SUFFIXES)


def weight_files(names: Iterable[str], load_format: str = "auto") -> list[str]:
    """The files that hold the weights, in the formats that `load_format` takes (as the engine's `ModelFiles`)."""
    names = sorted(names)
    # A folder without a model's weights may hold an adapter's.
    safetensors = _matching(names, "model*.safetensors") or _matching(names, "adapter_model.safetensors")
    pickled = _matching(names, "pytorch_model*.bin") or _matching(names, "adapter_model.bin")
    by_format = {"auto": safetensors or pickled, "safetensors": safetensors, "pt": pickled}
    return by_format.get(load_format, [])


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch(name, pattern)]


def _open_filesystem(uri: str) -> tuple[Any, str]:
    import pyarrow
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    check_bucket("model_source", uri)
    on_hub = _HUB_ADDRESS.match(uri)
    if on_hub is not None:
        raise ValueError(f"model_source={uri!r} is an address of the Hub: give the model's id, {on_hub['id']!r}")
    try:
        filesystem, path = FileSystem.from_uri(_with_limit(uri))
        return filesystem, path
    except pyarrow.ArrowInvalid as error:
        if "Unrecognized filesystem" not in str(error):
            raise ValueError(redact(f"model_source={uri!r} is not a valid address: {error}")) from None
    except OSError as error:
        raise _store_error(redact(uri), error) from error
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        scheme = uri.partition("://")[0]
        raise ValueError(
            f"model_source={redact(uri)!r} cannot be read: {redact(str(error))}; use s3://, gs:// or abfs://, "
            f"or install fsspec's package for {scheme}://"
        ) from None
    return PyFileSystem(FSSpecHandler(filesystem)), path


def _with_limit(uri: str) -> str:
    """The address, with an end to a client's retries where it sets none."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_SECONDS}"


def _store_error(uri: str, error: OSError) -> ValueError:
    cause = redact(str(error).partition(" (Request ID")[0])
    if "NO_SUCH_BUCKET" in cause:
        return ValueError(
            f"model_source={uri!r} not found: its bucket does not exist; check the bucket's name ({cause})"
        )
    if isinstance(error, FileNotFoundError):
        return ValueError(f"model_source={uri!r} not found: check bucket and folder ({cause})")
    if isinstance(error, PermissionError) or any(code in cause for code in _CREDENTIAL_ERRORS):
        remedy = (
            "check the credentials (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; for Google: "
            "GOOGLE_APPLICATION_CREDENTIALS) and their right to read it"
        )
        return ValueError(f"model_source={uri!r} was refused: {remedy} ({cause})")
    remedy = "check the network and the endpoint (for S3: AWS_ENDPOINT_URL, AWS_REGION)"
    return ValueError(f"model_source={uri!r} could not be read: {remedy} ({cause})")
