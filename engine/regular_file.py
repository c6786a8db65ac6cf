"""Reading small files that nobody vouches for: configs, indexes and headers of models and adapters.

Owns the bounds (kind of file, size, depth, digits) and the words for what exceeds them. Knows no model.
Invariant: reading ends in bounded time and memory, and whatever is wrong with the file is a ValueError that names it.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

# The largest known index is 10 MB; a tokenizer.json of 256,000 tokens 35 MB.
_MOST_JSON_BYTES = 256 << 20
_REMEDY = "download it again"


def check_regular(path: Path) -> None:
    """Refuse what is no regular file: a folder, a pipe (which would block its reader), a device, a dangling link.

    Raises:
        ValueError: naming the file and what it is.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({_cause(error)}): {_REMEDY}") from error
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
        raise ValueError(f"{str(path)!r} is {kind}, not a file: {_REMEDY}")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for a writer.

    Raises:
        ValueError: for anything else, and for one that cannot be opened.
    """
    check_regular(path)
    try:
        # Were it replaced by a pipe since, this would not block either.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({_cause(error)}): check who may read it") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: for a file that is none, that cannot be read, or is not JSON.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_JSON_BYTES:
            raise ValueError(f"{str(path)!r} has {size >> 20} MiB, too large for a model's JSON: {_REMEDY}")
        raw = file.read(size)
    try:
        return parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}): {_REMEDY}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: for anything else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not an object: {_REMEDY}")
    return content


def parse_json(raw: bytes, *, unique: bool = False) -> Any:
    """Parse JSON.

    Args:
        unique: Refuse objects that have a key twice.

    Raises:
        ValueError: for anything else, values nested too deeply and numbers of thousands of digits included.
    """
    try:
        # The parser itself refuses integers of more than 4300 digits, by a ValueError.
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def inside(folder: Path, name: object, said_by: str) -> Path:
    """The path of a file that another file of the model names; links are followed wherever they lead.

    The name alone is judged: the Hub's own cache keeps its files as links to a folder beside the model's.

    Args:
        said_by: What names it, for the message.

    Raises:
        ValueError: for a name that leads out of the folder, or is none.
    """
    path = PurePosixPath(name) if isinstance(name, str) and "\0" not in name else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{said_by} names {shown(name)}, which is no file in the model's folder: {_REMEDY}")
    return folder / path


def shown(value: object) -> str:
    """The repr of a value from a file, shortened: it may be huge, or nested deeply."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 120
    try:
        return brief.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def shorten(names: Iterable[str], most: int = 3) -> str:
    """The first few names."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(name[:120] for name in names[:most])}{rest}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
