"""Which files of an output folder count, and the keys of the rows in them.

An entry is written before its file. A file counts if, and only if, it is there in the size that an entry names: the
one upload that makes the file appear commits its rows, so there is no moment at which rows are visible and not
committed, or committed and not there. An entry without a file is a write that was cut; the next run clears it away.

The latest run owns the folder. No clock is read, and a store has no lock, so any step of a run may come late, after
later runs have begun and ended. Late steps are harmless by three rules:

- A run first leaves its mark, then reads the newest state, then writes its own, and looks again whether a later run has
  left a mark. If none has, every later run starts from this state: it is settled, and only then does the run act on it.
- Names are used once, by the run whose token they bear, and a name that a settled state leaves out never counts again.
  Runs delete such names and no others.
- After each step that makes a file visible a run looks whether it still owns the folder. If not, it takes back a file
  that the later run's settled state leaves out. If that run has not settled yet, it will see the file.

Stores must list what they hold, as S3, GCS, Azure and disks do. Owns the order of steps. Knows no rows and no Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydata_llm.ledger_entry import keys_in_parquet, seal, unsealed
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import (
    COPY,
    FOLDER,
    OLD_ENTRY,
    STAGED,
    STEPS,
    DamagedLedgerError,
    Entry,
    Records,
    Run,
    entries_among,
    in_parallel,
    is_error_file,
    read_ahead,
    read_records,
    token_of,
)
from raydata_llm.ledger_old_layout import forget_old_state, is_of_earlier_release, read_old_state
from raydata_llm.ledger_state import State, newest_state, write_state
from raydata_llm.sink_storage import Storage

# Entries of many short rows are hundreds of megabytes.
_PIECE_BYTES = 4 << 20
# Lies in the folder of a space whose `key_column` is not unique.
_CONTENT_MARK = "told-apart-by-content"
_BEGUN, _FINISHED = STEPS


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
        state: What counted when the run had begun.
    """

    storage: Storage
    letters: Storage
    run: Run
    state: State

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
            DamagedLedgerError: when what counts cannot be told any more; says what to do.
            RunSupersededError: when a later run has begun meanwhile.
        """
        visible = storage.sizes()
        records = read_records(storage)
        if not records.runs:
            _refuse_foreign_files(storage, visible)
        run = Run(max((run.number for run in records.runs), default=0) + 1, token, space)
        storage.put(run.path, b"")
        records = read_records(storage)
        ledger = cls(storage=storage, letters=letters, run=run, state=State(space=space))
        with ledger._still_ours():
            ledger._check_latest(records)
            base, entries = ledger._settle(records, visible, retry_errors=retry_errors)
            state = base.with_files(space, frozenset(entry.name for entry in entries), about)
            write_state(storage, run, _BEGUN, state)
            ledger.check_latest()
            ledger = replace(ledger, state=state)
            ledger._apply(state)
            forget_old_state(storage)
            ledger._forget_states(records)
        return ledger, sorted(entries)

    @property
    def staged(self) -> bool:
        """Whether another space's files are still the visible ones."""
        return self.state.space != self.run.space

    def commit(self, name: str, content: Any, keys: bytes) -> None:
        """Make a file and its rows count; it replaces one of that name.

        Raises:
            RunSupersededError: when a later run has begun.
            FileNotFoundError: when the folder was removed.
        """
        assert len(keys) % KEY_BYTES == 0
        self.storage.put(Entry(name, len(content)).path(self.run.space), seal(keys))
        self.check_latest()
        storage, path = self._place(name)
        storage.put(path, content)
        self._check_or_take_back([name], self.run.space)

    def check_latest(self) -> None:
        """Refuse to go on beside another run.

        Raises:
            RunSupersededError: when a later one has begun, or this one has ended.
            FileNotFoundError: when the folder was removed.
        """
        self._check_latest(read_records(self.storage))

    def withdraw(self, name: str) -> None:
        """Make a file of this run not count, if it does.

        Raises:
            RunSupersededError: when a later run has begun, which may count it: then it stays.
        """
        storage, path = self._place(name)
        if storage.size(path) is None:
            return
        with self._still_ours():
            content = storage.get(path)
        storage.delete(path)
        try:
            self.check_latest()
        except RunSupersededError:
            storage.put(path, content)
            self._take_back([name], self.run.space)
            raise

    def keys_of(self, name: str) -> bytes:
        """The keys of the rows of a file that counts.

        Raises:
            RunSupersededError: when a later run has begun, and changed the file.
            FileNotFoundError: when it is gone.
        """
        with self._still_ours():
            entry = self._seek_entry(name)
            if entry is None:
                raise FileNotFoundError(_gone(self.storage, [name]))
            return b"".join(self.read_keys([entry]))

    def replace(self, name: str, content: Any, keys: bytes) -> None:
        """Write a file that counts anew, with the same rows.

        Raises:
            RunSupersededError: when a later run has begun.
        """
        storage, path = self._place(name)
        size = storage.size(path)
        self.commit(name, content, keys)
        if size not in (None, len(content)):
            for kind in ("keys", OLD_ENTRY):
                self.storage.delete(Entry(name, size or 0, kind).path(self.run.space))

    def read_keys(self, entries: Iterable[Entry]) -> Iterator[bytes]:
        """The keys of files' rows, in pieces of which a few are in memory; none of an entry that is damaged.

        Raises:
            DamagedLedgerError: for an entry that is damaged, of a file that does not carry its keys.
        """
        sizes = self.storage.sizes(f"{FOLDER}/{self.run.space}")
        small: list[tuple[Entry, int]] = []
        large: list[tuple[Entry, int]] = []
        for entry in entries:
            size = sizes.get(entry.path(self.run.space).rpartition("/")[2], 0)
            (small if size <= _PIECE_BYTES else large).append((entry, size))
        with self._still_ours():
            yield from read_ahead(lambda one: b"".join(self._read_entry(*one)), small)
            for entry, size in large:
                yield from self._read_entry(entry, size)

    def tell_content_apart(self) -> None:
        """Have this run and later ones tell rows of one name apart by their content."""
        self.storage.put(f"{FOLDER}/{self.run.space}/{_CONTENT_MARK}", b"")

    def tells_content_apart(self) -> bool:
        """Whether a run has found rows of one name and different content."""
        return self.storage.size(f"{FOLDER}/{self.run.space}/{_CONTENT_MARK}") is not None

    def sizes_of_old_entries(self, entries: Iterable[Entry]) -> dict[Entry, int]:
        """The sizes of entries of an earlier release, whose bytes prove nothing."""
        old = [entry for entry in entries if entry.kind == OLD_ENTRY]
        sizes = self.storage.sizes(f"{FOLDER}/{self.run.space}") if old else {}
        return {entry: sizes.get(entry.path(self.run.space).rpartition("/")[2], 0) for entry in old}

    def entry_is_damaged(self, entry: Entry, path: str | None = None) -> str:
        """The words for an entry that is not what was written, with the remedy.

        Args:
            entry: The entry.
            path: Where its file lies, if not where it belongs.
        """
        return (
            f"{entry.path(self.run.space)!r} in {self.storage.label!r} is lost or damaged, so which rows are in its "
            f"file is not known: delete {path or self._place(entry.name)[1]!r} and run again, which does its rows anew"
        )

    def open_file(self, name: str) -> Any:
        """A file that counts, to read from."""
        storage, path = self._place(name)
        return storage.open_file(path)

    def get_file(self, name: str) -> bytes:
        """The whole of a file that counts."""
        storage, path = self._place(name)
        with self._still_ours():
            return storage.get(path)

    def finish(self, about: Mapping[str, Any], names: Collection[str]) -> None:
        """Make these files the ones that count, and their space the visible one.

        Args:
            about: What the space stands for, for people who look.
            names: The files that hold the job's rows, this run's and earlier ones'.

        Raises:
            RunSupersededError: when a later run has begun.
            FileNotFoundError: when files that counted are gone.
            DamagedLedgerError: when a file's entry is gone, and cannot be made again.
        """
        self.check_latest()
        with self._still_ours():
            sizes = self._file_sizes()
            entries = self._entries()
            missing = {name for name in names if name not in sizes or self._entry(name, sizes[name], entries) is None}
            if missing:
                raise FileNotFoundError(_gone(self.storage, missing))
            state = self.state.with_files(self.run.space, frozenset(names), about).promoted(self.run.space)
            write_state(self.storage, self.run, _FINISHED, state)
            self._check_latest(read_records(self.storage), may_have_ended=True)
            self._apply(state)

    @contextlib.contextmanager
    def _still_ours(self) -> Iterator[None]:
        """Tell an error for what it is where a later run has cleared away what this one looked for."""
        try:
            yield
        except (OSError, DamagedLedgerError):
            if (read_records(self.storage).latest or self.run) > self.run:
                raise self._superseded() from None
            raise

    def _check_latest(self, records: Records, *, may_have_ended: bool = False) -> None:
        if self.run not in records.runs:
            raise FileNotFoundError(
                f"{self.storage.label!r} was removed or emptied while the job ran, with what it had written: "
                "run the job again, which does all its rows anew"
            )
        if records.latest != self.run:
            raise self._superseded()
        if not may_have_ended and (self.run, STEPS.index(_FINISHED)) == records.newest_state:
            raise RunSupersededError(f"the run that this task belongs to has ended in {self.storage.label!r}")

    def _superseded(self) -> RunSupersededError:
        return RunSupersededError(
            f"another run writes to {self.storage.label!r} since: this one stops, so that no row is written twice"
        )

    def _check_or_take_back(self, names: Collection[str], space: str, *, may_have_ended: bool = False) -> None:
        """After files came into sight: if a later run has begun, take back those that it does not count."""
        try:
            self._check_latest(read_records(self.storage), may_have_ended=may_have_ended)
        except RunSupersededError:
            self._take_back(names, space)
            raise

    def _take_back(self, names: Collection[str], space: str) -> None:
        records = read_records(self.storage)
        newest = records.newest_state
        # Looked at twice: what is there at the second look was there before the next run can look.
        if newest is None or newest[0] != records.latest or read_records(self.storage) != records:
            return  # the later run has yet to settle what counts, and will find these files
        try:
            state = newest_state(self.storage, records)
        except DamagedLedgerError:
            return  # a run that is later still has cleared it away, and finds these files; or nothing is known
        assert state is not None
        self._delete(set(names) - state.names(space), space)

    def _settle(self, records: Records, visible: Mapping[str, int], *, retry_errors: bool) -> tuple[State, set[Entry]]:
        """The state that this run starts from, and what counts of its space.

        Args:
            records: Read after the run left its mark.
            visible: The files in the folder before.
            retry_errors: Forget error rows.
        """
        space = self.run.space
        base = newest_state(self.storage, records)
        last = records.newest_state
        if base is None:
            base = read_old_state(self.storage, self.letters, {run.space for run in records.runs})
        if base is None:
            _refuse_foreign_files(self.storage, visible)
            base = State(space=space)
        base = replace(base, runs=base.runs | records.runs)
        for one in {space, *([last[0].space] if last else [])}:
            view = replace(self, run=self.run._replace(space=one), state=base)
            found = view._find_counted(base.names(one), last)
            base = base.with_files(one, frozenset(entry.name for entry in found), base.about.get(one, {}))
            if one == space:
                entries = {entry for entry in found if not (retry_errors and entry.is_error)}
        if last is not None:
            self._refuse_unexplained_files(base, last[0])
        return base, entries

    def _find_counted(self, names: Collection[str], last: tuple[Run, int] | None) -> set[Entry]:
        """The entries of the files that are there, of those that counted and those that the last run wrote since."""
        # Files first: whatever of them was committed has an entry by now.
        sizes = self._file_sizes()
        entries = self._entries()
        counted = set(names) & sizes.keys()
        if last is not None and last[1] == STEPS.index(_BEGUN) and last[0].space == self.run.space:
            counted |= {name for name in sizes if token_of(name) == last[0].token}
        found = (self._entry(name, sizes[name], entries) for name in sorted(counted))
        return {entry for entry in found if entry is not None}

    def _refuse_unexplained_files(self, base: State, last: Run) -> None:
        """Stop where a run's files are there and what it said is lost: their rows would be done again beside them."""
        explained = {run.token for run in base.runs if run <= last}
        strange = sorted(
            name
            for name in self.storage.sizes()
            if token_of(name) not in (None, *explained) and name not in base.names(base.space)
        )
        if strange:
            raise DamagedLedgerError(
                f"{strange[0]!r} in {self.storage.label!r} ({len(strange)} such files) is of a run of which nothing "
                f"else is known there, so whether its rows are done is not known: delete {strange[0]!r} and run "
                "again, or give the job another folder"
            )

    def _apply(self, state: State) -> None:
        """Bring the folder to a settled state: delete what counts no more, then show what is to be visible."""
        runs = [run for run in state.runs if run <= self.run]
        tokens = {run.token for run in runs}
        visible = state.names(state.space)
        dead: list[tuple[Storage, str]] = []
        shown: list[tuple[Storage, str]] = []
        cut: set[str] = set()
        for store in self._stores:
            gone = [name for name in store.sizes() if token_of(name) in tokens and name not in visible]
            # Before anything is shown: files of two spaces are not visible together.
            in_parallel(store.delete, gone)
            for space in {*(run.space for run in runs), state.space}:
                folder = f"{FOLDER}/{space}"
                for path in store.sizes(folder):
                    name = _file_of(path)
                    if token_of(name) not in tokens:
                        continue
                    if name not in state.names(space):
                        dead.append((store, f"{folder}/{path}"))
                        cut |= {name, f"{folder}/{name}{STAGED}"}
                    elif path.endswith(STAGED) and space == state.space:
                        shown.append((store, f"{folder}/{path}"))
        for store in self._stores:
            store.clean(cut)
        in_parallel(lambda one: _show(*one), shown)
        in_parallel(lambda one: one[0].delete(one[1]), dead)
        if shown:
            names = [_file_of(path.rpartition("/")[2]) for _, path in shown]
            self._check_or_take_back(names, state.space, may_have_ended=True)

    def _forget_states(self, records: Records) -> None:
        """Delete the states of earlier runs, which mean nothing beside a later one; each check lists what is there."""
        old = [one for one in records.states if one[0] < self.run]
        in_parallel(lambda one: self.storage.delete(one[0].state_path(STEPS[one[1]]) + COPY * one[2]), old)

    def _delete(self, names: Iterable[str], space: str) -> None:
        """Delete files of a space wherever they may lie."""
        folder = f"{FOLDER}/{space}"
        for name in names:
            store = self._store(name)
            for path in (name, f"{folder}/{name}{STAGED}"):
                if store.size(path) is not None:
                    store.delete(path)

    @property
    def _stores(self) -> list[Storage]:
        return [self.storage] if self.letters.label == self.storage.label else [self.storage, self.letters]

    def _store(self, name: str) -> Storage:
        return self.letters if is_error_file(name) else self.storage

    def _place(self, name: str) -> tuple[Storage, str]:
        return self._store(name), f"{FOLDER}/{self.run.space}/{name}{STAGED}" if self.staged else name

    def _file_sizes(self) -> dict[str, int]:
        """The files of this space, where they belong, or where they wait to be shown when a run died over it."""
        sizes: dict[str, int] = {}
        for store in self._stores:
            staged = store.sizes(f"{FOLDER}/{self.run.space}")
            found = {path.removesuffix(STAGED): size for path, size in staged.items() if path.endswith(STAGED)}
            found |= {} if self.staged else store.sizes()
            sizes |= {name: size for name, size in found.items() if self._store(name).label == store.label}
        return {name: size for name, size in sizes.items() if token_of(name) is not None}

    def _entries(self) -> set[Entry]:
        return entries_among(self.storage.sizes(f"{FOLDER}/{self.run.space}"))

    def _entry(self, name: str, size: int, entries: Collection[Entry]) -> Entry | None:
        """A file's entry among those that were listed; see `_seek_entry`."""
        for kind in ("keys", OLD_ENTRY):
            if Entry(name, size, kind) in entries:
                return Entry(name, size, kind)
        return self._seek_entry(name)

    def _seek_entry(self, name: str) -> Entry | None:
        """A file's entry, as both are now, made again where it is lost; None when the file is gone or was cut."""
        size = self._size(name)
        if size is None:
            return None
        for kind in ("keys", OLD_ENTRY):
            entry = Entry(name, size, kind)
            if self.storage.size(entry.path(self.run.space)) is not None:
                return entry
        try:
            self._rebuild(Entry(name, size))
        except DamagedLedgerError:
            # With an entry for another size the file is not what was written.
            if any(entry.name == name for entry in self._entries()):
                return None
            raise
        return Entry(name, size)

    def _size(self, name: str) -> int | None:
        storage, path = self._place(name)
        size = storage.size(path)
        return size if size is not None or self.staged else storage.size(f"{FOLDER}/{self.run.space}/{name}{STAGED}")

    def _read_entry(self, entry: Entry, size: int) -> Iterator[bytes]:
        path = entry.path(self.run.space)

        def pieces() -> Iterator[bytes]:
            starts = range(0, size, _PIECE_BYTES)
            raw = (self.storage.get(path, start, length=_PIECE_BYTES) for start in starts)
            return raw if entry.kind == OLD_ENTRY else unsealed(raw)

        if entry.kind == OLD_ENTRY:
            if size and not size % KEY_BYTES:
                yield from pieces()
            else:
                yield self._rebuild(entry)
            return
        if size <= _PIECE_BYTES:
            try:
                whole = list(pieces())
            except ValueError:
                whole = [self._rebuild(entry)]
            yield from whole
            return
        # Nothing is handed out before all of it is proven, and it may be too long to be kept meanwhile.
        try:
            for _ in pieces():
                pass
        except ValueError:
            yield self._rebuild(entry)
            return
        yield from pieces()

    def _rebuild(self, entry: Entry) -> bytes:
        """Make an entry again from the keys that its file carries."""
        storage, path = self._place(entry.name)
        if storage.size(path) is None and not self.staged:
            path = f"{FOLDER}/{self.run.space}/{entry.name}{STAGED}"
        keys = keys_in_parquet(lambda start, length: storage.get(path, start, length=length), entry.size)
        if keys is None:
            raise DamagedLedgerError(self.entry_is_damaged(entry, path))
        self.storage.put(entry._replace(kind="keys").path(self.run.space), seal(keys))
        return keys


def holds_job(storage: Storage) -> bool:
    """Whether a run that can be resumed has begun in a folder."""
    return bool(read_records(storage).runs) or is_of_earlier_release(storage)


def _gone(storage: Storage, names: Collection[str]) -> str:
    return (
        f"{len(names)} files that the job had written are gone from {storage.label!r}, such as {min(names)!r}: "
        "run it again, which does their rows anew"
    )


def _file_of(path: str) -> str:
    """The name of the file that an entry or a staged file in a space's folder is of."""
    if path.endswith(STAGED):
        return path.removesuffix(STAGED)
    return next((entry.name for entry in entries_among([path])), path)


def _show(storage: Storage, staged: str) -> None:
    visible = _file_of(staged.rpartition("/")[2])
    try:
        storage.move(staged, visible)
    except OSError:
        # Another run may do the same, and may have deleted it since.
        if storage.size(staged) is not None:
            raise


def _refuse_foreign_files(storage: Storage, visible: Collection[str]) -> None:
    foreign = sorted(name for name in visible if not name.startswith((".", "_")))
    if not foreign or is_of_earlier_release(storage):
        return
    raise ValueError(
        f"path={storage.label!r} holds {len(foreign)} files of no resumable run, such as {foreign[0]!r}: "
        "give ResumeConfig and the sink a folder of their own"
    )
