"""Which files of an output folder count, and the keys of the rows in them.

An entry is written before its file. A file counts if, and only if, it is there in the size that an entry names: the
one upload that makes the file appear commits its rows, so there is no moment at which rows are visible and not
committed, or committed and not there. An entry without a file is a write that was cut; the next run clears it away.

The latest run owns the folder. An earlier one that is still alive finds that out before and after each upload, and
takes back a file that the later run did not count. No clock is read. Stores must list what they hold, as S3, GCS, Azure
and disks do.

Owns the order of steps. Knows no rows and no Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import (
    FOLDER,
    STAGED,
    Entry,
    Run,
    current_space,
    in_parallel,
    is_error_file,
    read_ahead,
    read_entries,
    read_runs,
    token_of,
    write_current,
)
from raydata_llm.ledger_promotion import finish_promotion, promote
from raydata_llm.sink_storage import Storage

# Entries of many short rows are hundreds of megabytes.
_PIECE_BYTES = 4 << 20


class RunSupersededError(RuntimeError):
    """A later run has taken the folder over."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """One key space of one folder, as one run sees it; travels to tasks.

    Made by `begin`.

    Args:
        storage: The folder.
        letters: The folder for error rows, which may be the same.
        run: Which this is.
        staged: Whether another space's files are still the visible ones.
    """

    storage: Storage
    letters: Storage
    run: Run
    staged: bool

    @classmethod
    def begin(
        cls, storage: Storage, letters: Storage, space: str, token: str, about: Mapping[str, Any], *, retry_errors: bool
    ) -> tuple[Ledger, list[Entry]]:
        """Take the folder over for a run and clear away what earlier ones left unfinished.

        Args:
            storage: The folder.
            letters: The folder for error rows, which may be the same.
            space: The key space.
            token: The run's, eight hexadecimal digits.
            about: What the space stands for, for people who look.
            retry_errors: Forget error rows, so that they run again.

        Returns:
            The ledger, and the entries that count.

        Raises:
            ValueError: for files that no such run wrote.
        """
        if current_space(storage) is None:
            _refuse_foreign_files(storage)
        run = Run(max((run.number for run in read_runs(storage)), default=0) + 1, token, space)
        storage.put(run.path, b"")
        finish_promotion(storage, letters)
        current = current_space(storage)
        if current is None:
            write_current(storage, space, about)
        ledger = cls(storage=storage, letters=letters, run=run, staged=current not in (None, space))
        return ledger, ledger._recover(retry_errors=retry_errors)

    def commit(self, name: str, content: Any, keys: bytes) -> None:
        """Make a file and its rows count; it replaces one of that name.

        Raises:
            RunSupersededError: when a later run has begun.
        """
        assert len(keys) % KEY_BYTES == 0
        entry = Entry(name, len(content))
        self.storage.put(entry.path(self.run.space), keys)
        self.check_latest()
        storage, path = self._place(name)
        storage.put(path, content)
        try:
            self.check_latest()
        except RunSupersededError:
            if self.storage.size(entry.path(self.run.space)) is None:
                storage.delete(path)  # it came after the later run had looked, which does these rows itself
            raise

    def check_latest(self) -> None:
        """Refuse to go on beside another run.

        Raises:
            RunSupersededError: when a later one has begun.
        """
        if max(read_runs(self.storage)) != self.run:
            raise RunSupersededError(
                f"another run writes to {self.storage.label!r} since: this one stops, so that no row is written twice"
            )

    def withdraw(self, name: str) -> None:
        """Make a file of this run not count, if it does."""
        storage, path = self._place(name)
        if storage.size(path) is not None:
            storage.delete(path)

    def replace(self, name: str, content: Any) -> None:
        """Write a file that counts anew, with the same rows.

        Raises:
            RunSupersededError: when a later run has begun.
        """
        storage, path = self._place(name)
        size = storage.size(path)
        assert size is not None, "it counts"
        old = Entry(name, size)
        self.commit(name, content, self.storage.get(old.path(self.run.space)))
        if len(content) != size:
            self.storage.delete(old.path(self.run.space))

    def read_keys(self, entries: Iterable[Entry]) -> Iterator[bytes]:
        """The keys of files' rows, in pieces of which a few are in memory."""
        paths = [entry.path(self.run.space) for entry in entries]
        sizes = self.storage.sizes(f"{FOLDER}/{self.run.space}")
        pieces = [(path, start) for path in paths for start in range(0, sizes[path.rpartition("/")[2]], _PIECE_BYTES)]
        return read_ahead(lambda piece: self.storage.get(*piece, length=_PIECE_BYTES), pieces)

    def open_file(self, name: str) -> Any:
        """A file that counts, to read from."""
        storage, path = self._place(name)
        return storage.open_file(path)

    def finish(self, about: Mapping[str, Any], names: Collection[str]) -> None:
        """Make this space's files the visible ones, and only those that count.

        Args:
            about: What the space stands for, for people who look.
            names: The files that hold the job's rows, this run's and earlier ones'.

        Raises:
            RunSupersededError: when a later run has begun.
            FileNotFoundError: when files that counted are gone.
        """
        self.check_latest()
        entries = read_entries(self.storage, self.run.space)
        files = {Entry(name, size) for name, size in self._file_sizes(self._tokens()).items()}
        self._drop_stray_files(files - entries)
        # A user may have deleted one, or a process of an earlier run may have replaced it too late and taken it back.
        missing = set(names) - {file.name for file in files & entries}
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} files that the job had written are gone from {self.storage.label!r}, such as "
                f"{min(missing)!r}: run it again, which does their rows anew"
            )
        if self.staged:
            promote(self.storage, self.letters, self.run.space, about)

    @property
    def _stores(self) -> list[Storage]:
        return [self.storage] if self.letters.label == self.storage.label else [self.storage, self.letters]

    def _place(self, name: str) -> tuple[Storage, str]:
        storage = self.letters if is_error_file(name) else self.storage
        return storage, f"{FOLDER}/{self.run.space}/{name}{STAGED}" if self.staged else name

    def _recover(self, *, retry_errors: bool) -> list[Entry]:
        tokens = self._tokens()
        entries = {entry for entry in read_entries(self.storage, self.run.space) if token_of(entry.name) in tokens}
        sizes = self._file_sizes(tokens)
        counts = {entry for entry in entries if sizes.get(entry.name) == entry.size}
        kept = {entry for entry in counts if not (retry_errors and entry.is_error)}
        # Entries first: an earlier run that is still uploading takes its file back when it finds its entry gone.
        in_parallel(lambda entry: self.storage.delete(entry.path(self.run.space)), entries - kept)
        for storage, paths in self._by_store(entry.name for entry in entries - counts):
            storage.clean(paths)
        self._delete_files((sizes.keys() | {entry.name for entry in entries}) - {entry.name for entry in kept})
        return sorted(kept)

    def _drop_stray_files(self, files: Iterable[Entry]) -> None:
        """Delete what an earlier run wrote after this one had begun, and was killed before it took it back."""
        # Looked at once more: an entry may be younger than the list that lacks it.
        self._delete_files(file.name for file in files if self.storage.size(file.path(self.run.space)) is None)

    def _tokens(self) -> set[str]:
        """Of this run and those before it: other files are none of its business."""
        return {run.token for run in read_runs(self.storage) if run <= self.run}

    def _file_sizes(self, tokens: set[str]) -> dict[str, int]:
        folder, suffix = (f"{FOLDER}/{self.run.space}", STAGED) if self.staged else ("", "")
        sizes: dict[str, int] = {}
        for store in self._stores:
            found = {
                path.removesuffix(suffix): size for path, size in store.sizes(folder).items() if path.endswith(suffix)
            }
            sizes |= {name: size for name, size in found.items() if self._place(name)[0].label == store.label}
        return {name: size for name, size in sizes.items() if token_of(name) in tokens}

    def _delete_files(self, names: Iterable[str]) -> None:
        for storage, paths in self._by_store(names):
            in_parallel(storage.delete, paths)

    def _by_store(self, names: Iterable[str]) -> list[tuple[Storage, list[str]]]:
        """Where files may lie: error files of a run without a folder for them are among the others."""
        names = list(names)
        return [
            (
                store,
                [self._place(name)[1] for name in names if store.label == self.storage.label or is_error_file(name)],
            )
            for store in self._stores
        ]


def _refuse_foreign_files(storage: Storage) -> None:
    foreign = sorted(name for name in storage.sizes() if not name.startswith((".", "_")))
    if foreign:
        raise ValueError(
            f"path={storage.label!r} holds {len(foreign)} files of no resumable run, such as {foreign[0]!r}: "
            "give ResumeConfig and the sink a folder of their own"
        )
