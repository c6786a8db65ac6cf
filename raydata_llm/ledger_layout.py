"""What lies where in an output folder, and the names by which it is known again.

    path/part-1f3a9c02-000001.parquet                          a file of answers
    path/_raydata_llm/current.json                             the key space that the files in path belong to
    path/_raydata_llm/runs/00000002-7be0d1aa-<space>           the runs, in order
    path/_raydata_llm/<space>/<file name>.<file size>.ledger   an entry: the keys of the file's rows, 16 bytes each
    path/_raydata_llm/<space>/<file name>.staged               a file of a space that is not the current one yet

A folder for error rows has the files and the staged ones. Knows no order of steps; that is `raydata_llm.ledger`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from raydata_llm.sink_storage import Storage

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")

FOLDER = "_raydata_llm"
CURRENT = f"{FOLDER}/current.json"
STAGED = ".staged"
_RUNS = f"{FOLDER}/runs"
_ENTRY = re.compile(r"(?P<name>.+)\.(?P<size>\d+)\.ledger")
_RUN = re.compile(r"(?P<number>\d{8})-(?P<token>[0-9a-f]{8})-(?P<space>.+)")
_FILE = re.compile(r"(?:part|errors)-(?P<token>[0-9a-f]{8})-\d{6,}\.\w+(?:\.gz)?")
# Small requests to an object store take 10-50 ms each, and a folder holds thousands of files.
_REQUESTS_AT_ONCE = 16


class Entry(NamedTuple):
    """What a ledger says of one file: its name and size."""

    name: str
    size: int

    @property
    def is_error(self) -> bool:
        """Whether the file holds error rows."""
        return is_error_file(self.name)

    def path(self, space: str) -> str:
        """Where the entry lies."""
        return f"{FOLDER}/{space}/{self.name}.{self.size}.ledger"


class Run(NamedTuple):
    """One run of a job; a larger one came later."""

    number: int
    token: str
    space: str

    @property
    def path(self) -> str:
        """Where its mark lies."""
        return f"{_RUNS}/{self.number:08d}-{self.token}-{self.space}"


def file_name(token: str, number: int, suffix: str, *, errors: bool) -> str:
    """The name of a run's file; sorted, a run's files are in the order in which they were begun."""
    return f"{'errors' if errors else 'part'}-{token}-{number:06d}{suffix}"


def is_error_file(name: str) -> bool:
    """Whether a file of this name holds error rows."""
    return name.startswith("errors-")


def token_of(name: str) -> str | None:
    """The token of the run that wrote a file; None for a file that `file_name` did not name."""
    found = _FILE.fullmatch(name)
    return found["token"] if found else None


def read_runs(storage: Storage) -> list[Run]:
    """The runs that began in a folder."""
    found = filter(None, map(_RUN.fullmatch, storage.sizes(_RUNS)))
    return [Run(int(match["number"]), match["token"], match["space"]) for match in found]


def read_entries(storage: Storage, space: str) -> set[Entry]:
    """The entries of a space, whether their files are there or not."""
    found = filter(None, map(_ENTRY.fullmatch, storage.sizes(f"{FOLDER}/{space}")))
    return {Entry(match["name"], int(match["size"])) for match in found}


def current_space(storage: Storage) -> str | None:
    """The space that the visible files belong to; None in a folder that no resumable run has used."""
    current = read_json(storage, CURRENT)
    return None if current is None else str(current["space"])


def write_current(storage: Storage, space: str, about: Mapping[str, Any]) -> None:
    """Say which space the visible files belong to, and what it stands for."""
    storage.put(CURRENT, json.dumps({"space": space, **about}, indent=1).encode())


def read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    """A small file's content; None when it is not there."""
    if storage.size(name) is None:
        return None
    content: dict[str, Any] = json.loads(storage.get(name))
    return content


def in_parallel(function: Callable[[_Value], object], values: Iterable[_Value]) -> None:
    """Run a function that waits for a store on many values."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        list(pool.map(function, values))


def read_ahead(function: Callable[[_Value], _Result], values: Sequence[_Value]) -> Iterator[_Result]:
    """What a function that waits for a store makes of the values, in order; a few are under way or in memory."""
    # A pool's `map` would hold all that it has read ahead, which may be everything.
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for start in range(0, len(values), _REQUESTS_AT_ONCE):
            yield from pool.map(function, values[start : start + _REQUESTS_AT_ONCE])
