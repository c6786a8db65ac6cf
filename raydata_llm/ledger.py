"""Which files of an output folder count, and the keys of the rows in them.

    path/part-1f3a9c02-000001.parquet                              a file of answers
    path/_raydata_llm/current.json                                 the key space that the files in path belong to
    path/_raydata_llm/<space>/<file name>.<file size>.ledger       the file's keys, 16 bytes each
    path/_raydata_llm/<space>/run-00000002-7be0d1aa                the runs, in order
    path/_raydata_llm/<space>/<file name>.staged                   a file of a space that is not the current one yet

An entry is written before its file. A file counts if, and only if, it is there in the size that an entry names: the
one upload that makes the file appear commits its rows, so there is no moment at which rows are visible and not
committed, or committed and not there. An entry without a file is a write that was cut; the next run clears it away.

Owns this layout and the order of steps. Knows no rows and no Ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.sink_storage import Storage

FOLDER = "_raydata_llm"
_CURRENT = f"{FOLDER}/current.json"
_PROMOTION = f"{FOLDER}/promotion.json"
_ENTRY = re.compile(r"(?P<name>.+)\.(?P<size>\d+)\.ledger")
_RUN = re.compile(r"run-(?P<number>\d{8})-(?P<token>\w+)")
_FILE = re.compile(r"(part|errors)-[0-9a-f]{8}-\d{6}\.\w+(\.gz)?")
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


class RunSupersededError(RuntimeError):
    """A later run has taken the folder over."""


def file_name(token: str, number: int, suffix: str, *, errors: bool) -> str:
    """The name of a run's file; sorted, a run's files are in the order in which they were begun."""
    return f"{'errors' if errors else 'part'}-{token}-{number:06d}{suffix}"


def is_error_file(name: str) -> bool:
    """Whether a file of this name holds error rows."""
    return name.startswith("errors-")


def is_ours(name: str) -> bool:
    """Whether `file_name` made this name."""
    return _FILE.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """One key space of one folder, as one run sees it; travels to tasks.

    Made by `begin`.

    Args:
        storage: The folder.
        letters: The folder for error rows, which may be the same.
        space: The key space.
        token: The run's.
        staged: Whether another space's files are still the visible ones.
    """

    storage: Storage
    letters: Storage
    space: str
    token: str
    staged: bool

    @classmethod
    def begin(
        cls, storage: Storage, letters: Storage, space: str, token: str, about: Mapping[str, Any], *, retry_errors: bool
    ) -> tuple[Ledger, list[Entry]]:
        """Take the folder over for a run and clear away what earlier ones left unfinished.

        Args:
            about: What the space stands for, for people who look.
            retry_errors: Forget error rows, so that they run again.

        Returns:
            The ledger, and the entries that count.

        Raises:
            ValueError: for files that no such run wrote.
        """
        _finish_promotion(storage)
        current = _read_json(storage, _CURRENT)
        if current is None:
            foreign = [name for name in storage.sizes() if not name.startswith((".", "_"))]
            if foreign:
                raise ValueError(
                    f"path={storage.label!r} holds {len(foreign)} files of no resumable run, such as {foreign[0]!r}: "
                    "give ResumeConfig and the sink a folder of their own"
                )
            storage.put(_CURRENT, json.dumps({"space": space, **about}, indent=1).encode())
        staged = current is not None and current["space"] != space
        ledger = cls(storage=storage, letters=letters, space=space, token=token, staged=staged)
        runs = ledger._runs()
        storage.put(f"{ledger._folder}/run-{max(runs, default=0) + 1:08d}-{token}", b"")
        return ledger, ledger._recover(retry_errors=retry_errors)

    def commit(self, name: str, content: Any, keys: bytes) -> None:
        """Make a file and its rows count.

        Raises:
            RunSupersededError: when a later run has begun.
        """
        assert len(keys) % KEY_BYTES == 0
        self.storage.put(self._entry_path(Entry(name, len(content))), keys)
        runs = self._runs()
        if runs[max(runs)] != self.token:
            raise RunSupersededError(
                f"another run writes to {self.storage.label!r} with the same ResumeConfig since: this one stops, "
                "so that no row is written twice"
            )
        storage, path = self._place(name)
        storage.put(path, content)

    def committed_size(self, name: str) -> int | None:
        """The size of a file that counts already; None when it does not."""
        storage, path = self._place(name)
        size = storage.size(path)
        return size if size is not None and self.storage.size(self._entry_path(Entry(name, size))) is not None else None

    def replace(self, old: Entry, content: Any) -> Entry:
        """Write a file that counts anew, with the same rows."""
        new = Entry(old.name, len(content))
        if new.size != old.size:
            self.storage.put(self._entry_path(new), self.storage.get(self._entry_path(old)))
        storage, path = self._place(old.name)
        storage.put(path, content)
        if new.size != old.size:
            self.storage.delete(self._entry_path(old))
        return new

    def read_keys(self, entry: Entry) -> bytes:
        """The keys of a file's rows."""
        return self.storage.get(self._entry_path(entry))

    def open_file(self, name: str) -> Any:
        """A file that counts, to read from."""
        storage, path = self._place(name)
        return storage.open_file(path)

    def abandon(self, name: str) -> None:
        """Clear away what a failed commit left in the store."""
        storage, path = self._place(name)
        storage.clean([path])

    def finish(self, about: Mapping[str, Any]) -> None:
        """Make this space's files the visible ones, and only those that count."""
        counts = set(_entries(self.storage, self._folder))
        sizes = self._file_sizes()
        # A file without an entry is a write of an earlier run that came through after this one had begun.
        self._delete_files({name for name, size in sizes.items() if Entry(name, size) not in counts})
        if not self.staged:
            return
        current = _read_json(self.storage, _CURRENT)
        assert current is not None, "another space is the current one"
        promotion = {"from": current["space"], "to": self.space, "about": dict(about)}
        self.storage.put(_PROMOTION, json.dumps(promotion).encode())
        _finish_promotion(self.storage)

    @property
    def _folder(self) -> str:
        return f"{FOLDER}/{self.space}"

    def _entry_path(self, entry: Entry) -> str:
        return f"{self._folder}/{entry.name}.{entry.size}.ledger"

    def _place(self, name: str) -> tuple[Storage, str]:
        if is_error_file(name) and self.letters.label != self.storage.label:
            return self.letters, name
        return self.storage, f"{self._folder}/{name}.staged" if self.staged else name

    def _runs(self) -> dict[int, str]:
        found = (_RUN.fullmatch(name) for name in self.storage.sizes(self._folder))
        return {int(match["number"]): match["token"] for match in found if match}

    def _recover(self, *, retry_errors: bool) -> list[Entry]:
        entries, sizes = set(_entries(self.storage, self._folder)), self._file_sizes()
        counts = {entry for entry in entries if sizes.get(entry.name) == entry.size}
        kept = {entry for entry in counts if not (retry_errors and entry.is_error)}
        self._clean({entry.name for entry in entries - counts})
        self._delete_files((sizes.keys() | {entry.name for entry in entries}) - {entry.name for entry in kept})
        _in_parallel(lambda entry: self.storage.delete(self._entry_path(entry)), entries - kept)
        return sorted(kept)

    def _clean(self, names: Iterable[str]) -> None:
        for storage, paths in self._by_storage(names):
            storage.clean(paths)

    def _delete_files(self, names: Iterable[str]) -> None:
        for storage, paths in self._by_storage(names):
            _in_parallel(storage.delete, paths)

    def _by_storage(self, names: Iterable[str]) -> list[tuple[Storage, list[str]]]:
        places = [self._place(name) for name in names]
        storages = {storage.label: storage for storage, _ in places}
        return [
            (storage, [path for other, path in places if other.label == label]) for label, storage in storages.items()
        ]

    def _file_sizes(self) -> dict[str, int]:
        suffix = ".staged" if self.staged else ""
        found = self.storage.sizes(self._folder if self.staged else "")
        sizes = {name.removesuffix(suffix): size for name, size in found.items() if name.endswith(suffix)}
        sizes = {name: size for name, size in sizes.items() if is_ours(name)}
        if self.letters.label != self.storage.label:
            sizes |= {
                name: size for name, size in self.letters.sizes().items() if is_ours(name) and is_error_file(name)
            }
        return sizes


def _finish_promotion(storage: Storage) -> None:
    """Put one space's files into the place of another's: out with the old, in with the new; any step may be the
    first of a further attempt."""
    promotion = _read_json(storage, _PROMOTION)
    if promotion is None:
        return
    old, new = f"{FOLDER}/{promotion['from']}", f"{FOLDER}/{promotion['to']}"
    _in_parallel(lambda entry: storage.delete(entry.name), list(_entries(storage, old)))
    _in_parallel(lambda name: storage.delete(f"{old}/{name}"), list(storage.sizes(old)))
    staged = [name for name in storage.sizes(new) if name.endswith(".staged")]
    _in_parallel(lambda name: storage.move(f"{new}/{name}", name.removesuffix(".staged")), staged)
    storage.put(_CURRENT, json.dumps({"space": promotion["to"], **promotion["about"]}, indent=1).encode())
    storage.delete(_PROMOTION)


def _entries(storage: Storage, folder: str) -> Iterator[Entry]:
    for found in map(_ENTRY.fullmatch, storage.sizes(folder)):
        if found:
            yield Entry(found["name"], int(found["size"]))


def _read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    if storage.size(name) is None:
        return None
    content: dict[str, Any] = json.loads(storage.get(name))
    return content


def _in_parallel(function: Any, values: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        list(pool.map(function, values))
