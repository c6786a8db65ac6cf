"""What lies where in an output folder, and the names by which it is known again.

    path/part-1f3a9c02-000001.parquet                       a file of answers
    path/_raydata_llm/runs/00000002-7be0d1aa-<space>        a run began: the runs, in order
    path/_raydata_llm/runs/00000002-7be0d1aa-<space>.begun  which files counted then (.finished: at its end)
    path/_raydata_llm/<space>/<file name>.<file size>.keys  an entry: the keys of the file's rows
    path/_raydata_llm/<space>/<file name>.staged            a file of a space that is not the visible one yet

Earlier releases wrote entries without a proof, `.ledger`, which are read on. A folder for error rows has the files and
the staged ones. Knows no order of steps; that is `raydata_llm.ledger`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from raydata_llm.sink_storage import Storage

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")

FOLDER = "_raydata_llm"
STAGED = ".staged"
OLD_ENTRY = "ledger"
# The ends of names of a run's states, in order, and of a state's second copy.
STEPS = ("begun", "finished")
COPY = ".copy"
_RUNS = f"{FOLDER}/runs"
_ENTRY = re.compile(r"(?P<name>.+)\.(?P<size>\d+)\.(?P<kind>keys|ledger)")
_RUN = re.compile(
    r"(?P<number>\d{8})-(?P<token>[0-9a-f]{8})-(?P<space>[^.]+)(?:\.(?P<step>begun|finished)(?P<copy>\.copy)?)?"
)
_FILE = re.compile(r"(?:part|errors)-(?P<token>[0-9a-f]{8})-\d{6,}\.\w+(?:\.gz)?")
# Small requests to an object store take 10-50 ms each, and a folder holds thousands of files.
_REQUESTS_AT_ONCE = 16


class DamagedLedgerError(ValueError):
    """A folder's ledger is not what was written; says which file, and what to do."""


class Entry(NamedTuple):
    """What a ledger says of one file: its name and size.

    Args:
        name: The file's.
        size: The file's.
        kind: "keys", or "ledger" of an earlier release, which is keys without a proof.
    """

    name: str
    size: int
    kind: str = "keys"

    @property
    def is_error(self) -> bool:
        """Whether the file holds error rows."""
        return is_error_file(self.name)

    def path(self, space: str) -> str:
        """Where the entry lies."""
        return f"{FOLDER}/{space}/{self.name}.{self.size}.{self.kind}"


class Run(NamedTuple):
    """One run of a job; a larger one came later."""

    number: int
    token: str
    space: str

    @property
    def path(self) -> str:
        """Where its mark lies."""
        return f"{_RUNS}/{self.number:08d}-{self.token}-{self.space}"

    def state_path(self, step: str) -> str:
        """Where its state of a step lies."""
        return f"{self.path}.{step}"


class Records(NamedTuple):
    """What a folder's list of runs says.

    Args:
        runs: All that began; a state stands for its run's mark, too.
        states: A run, the number of a step in `STEPS`, and whether it is the second copy.
    """

    runs: frozenset[Run]
    states: frozenset[tuple[Run, int, bool]]

    @property
    def latest(self) -> Run | None:
        """The run that owns the folder."""
        return max(self.runs, default=None)

    @property
    def newest_state(self) -> tuple[Run, int] | None:
        """The run and step of the state that holds."""
        return max(((run, step) for run, step, _ in self.states), default=None)


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


def read_records(storage: Storage) -> Records:
    """The runs that began in a folder, and the states that they wrote, by one request."""
    runs, states = set(), set()
    for match in filter(None, map(_RUN.fullmatch, storage.sizes(_RUNS))):
        run = Run(int(match["number"]), match["token"], match["space"])
        runs.add(run)
        if match["step"]:
            states.add((run, STEPS.index(match["step"]), bool(match["copy"])))
    return Records(frozenset(runs), frozenset(states))


def entries_among(names: Iterable[str]) -> set[Entry]:
    """The entries among the names in a space's folder, whether their files are there or not."""
    found = filter(None, map(_ENTRY.fullmatch, names))
    return {Entry(match["name"], int(match["size"]), match["kind"]) for match in found}


def in_parallel(function: Callable[[_Value], object], values: Iterable[_Value]) -> None:
    """Run a function that waits for a store on many values."""
    values = list(values)
    if values:
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(pool.map(function, values))


def read_ahead(function: Callable[[_Value], _Result], values: Sequence[_Value]) -> Iterator[_Result]:
    """What a function that waits for a store makes of the values, in order; a few are under way or in memory."""
    # A pool's `map` would hold all that it has read ahead, which may be everything.
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for start in range(0, len(values), _REQUESTS_AT_ONCE):
            yield from pool.map(function, values[start : start + _REQUESTS_AT_ONCE])
