"""Small text files in a folder, local or remote: where reports go.

Owns the choice of a file system for an address (pyarrow's own first, fsspec's after). Knows no reports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from raydata_llm.redaction import redact


def write_texts(folder: str, texts: Mapping[str, str], *, filesystem: Any = None) -> list[str]:
    """Write files by name; returns their paths.

    Args:
        folder: It is made if it is not there.
        texts: File name to content.
        filesystem: pyarrow's or fsspec's; None takes the address's own.

    Raises:
        ValueError: naming the folder, what went wrong and the remedy.
    """
    try:
        opened, path = _open(folder, filesystem)
        opened.create_dir(path, recursive=True)
        for name, text in texts.items():
            with opened.open_output_stream(f"{path}/{name}") as stream:
                stream.write(text.encode())
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            redact(f"report folder {folder!r} cannot be written: {error}; give a folder that this process may write")
        ) from error
    return [redact(f"{folder.rstrip('/')}/{name}") for name in texts]


def _open(folder: str, filesystem: Any) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

    if isinstance(filesystem, FileSystem):
        return filesystem, folder.partition("://")[2].rstrip("/") or folder.rstrip("/")
    if filesystem is not None:
        return PyFileSystem(FSSpecHandler(filesystem)), filesystem._strip_protocol(folder)
    if "://" not in folder:
        return LocalFileSystem(), os.path.expanduser(folder).rstrip("/") or "/"
    try:
        opened, path = FileSystem.from_uri(folder)
        return opened, path
    except ValueError:
        import fsspec

        opened, path = fsspec.core.url_to_fs(folder)
        return PyFileSystem(FSSpecHandler(opened)), path
