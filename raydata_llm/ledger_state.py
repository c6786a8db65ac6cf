"""Which files count in a folder, as one record that proves itself: the visible key space, and each space's files.

A run writes a state when it has begun and one when it has finished, under names of its own that no other run writes.
The state of the latest run holds, the later of its two steps; a state of an earlier run that reaches the store late
means nothing. Each is written twice, so that one of them may be lost. Knows what a state says, not when one is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raydata_llm.ledger_layout import COPY, STEPS, DamagedLedgerError, Records, Run
from raydata_llm.sink_storage import Storage


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """Which files count.

    Args:
        space: The key space whose files are the visible ones.
        files: The names of the files that count, by space; those of other spaces than `space` are staged.
        about: What each space stands for, for people who look.
        runs: Those that had begun, should their marks be lost.
    """

    space: str
    files: Mapping[str, frozenset[str]] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runs: frozenset[Run] = frozenset()

    def names(self, space: str) -> frozenset[str]:
        """The files of a space that count."""
        return self.files.get(space, frozenset())

    def with_files(self, space: str, names: frozenset[str], about: Mapping[str, Any]) -> State:
        """The same with other files in a space."""
        return replace(self, files={**self.files, space: names}, about={**self.about, space: dict(about)})

    def promoted(self, space: str) -> State:
        """The same with a space's files in the place of the visible ones, which count no more."""
        if space == self.space:
            return self
        files = {name: files for name, files in self.files.items() if name != self.space}
        about = {name: about for name, about in self.about.items() if name != self.space}
        return replace(self, space=space, files=files, about=about)


def write_state(storage: Storage, run: Run, step: str, state: State) -> None:
    """Write a run's state, twice."""
    body = {
        "version": 1,
        "space": state.space,
        "files": {space: sorted(names) for space, names in sorted(state.files.items())},
        "about": state.about,
        "runs": sorted(state.runs),
    }
    content = json.dumps({"digest": _digest(body), "state": body}, indent=1).encode()
    for path in (run.state_path(step), run.state_path(step) + COPY):
        storage.put(path, content)


def newest_state(storage: Storage, records: Records) -> State | None:
    """The state that holds, of those that a list of runs names; None when it names none.

    Raises:
        DamagedLedgerError: when neither copy proves itself.
    """
    newest = records.newest_state
    if newest is None:
        return None
    run, step = newest
    path = run.state_path(STEPS[step])
    for is_copy in (False, True):
        if (run, step, is_copy) in records.states:
            state = _read(_get(storage, path + COPY if is_copy else path))
            if state is not None:
                return state
    raise DamagedLedgerError(
        f"{path!r} in {storage.label!r} is damaged, and so is its copy, so which files count there is not known: "
        "restore one of the two from a backup, or give the job another folder"
    )


def _get(storage: Storage, path: str) -> bytes:
    try:
        return storage.get(path)
    except OSError:
        if storage.size(path) is None:  # a later run has deleted it
            return b""
        raise


def _read(content: bytes) -> State | None:
    try:
        record = json.loads(content)
        body = record["state"]
        if record["digest"] != _digest(body) or body["version"] != 1:
            return None
    except (ValueError, KeyError, TypeError):
        return None
    files = {space: frozenset(names) for space, names in body["files"].items()}
    runs = frozenset(Run(*run) for run in body["runs"])
    return State(space=body["space"], files=files, about=body["about"], runs=runs)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()
