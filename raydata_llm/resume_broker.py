"""One actor beside the driver that knows which rows earlier runs committed, and hands each committed copy out once.

Identical rows can lie in any two blocks, so one place must count them. A block's answer is remembered, so a task that
Ray runs again skips the same rows. Owns the counts and the checks that anything matches at all, that a key column tells
rows apart, and that no row comes to the sink twice; the keys themselves are `KeyIndex`'s. If the actor is lost, the job
stops; its next run starts from the ledger.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from raydata_llm.ledger import Ledger
from raydata_llm.ledger_index import KEY_BYTES, KeyIndex, Mask, SharedNameError
from raydata_llm.ledger_layout import Entry
from raydata_llm.occurrences import Occurrences
from raydata_llm.redaction import masked_logger

logger = masked_logger(__name__)

# A task finds the broker of the run that it belongs to under this name in its DataContext.
BROKER_SETTING = "raydata_llm.resume_broker"
_NAMESPACE = "raydata_llm"
# Rows after which a run that meets none of the committed ones is stopped.
_PROOF_ROWS = 10_000
_NONE, _ALL = b"none", b"all"


class Claimant(NamedTuple):
    """Who asks: the same in a retry. `part` tells apart the calls of one task."""

    kind: str
    number: int
    part: int


class Counts(NamedTuple):
    """How many keys were committed, asked for and found."""

    committed: int
    asked: int
    found: int


class ResumeBroker:
    """The actor's class; `load` comes first.

    Args:
        ledger: Of the run.
        key_column: The column that tells rows apart, if it is one.
    """

    def __init__(self, ledger: Ledger, key_column: str | None = None) -> None:
        self._ledger = ledger
        self._key_column = key_column
        self._by_name = key_column is not None
        self._written = Occurrences()
        self._index = KeyIndex([])
        self._answers: dict[bytes, bytes] = {}
        self._asked = self._found = 0

    def load(self, entries: Sequence[Entry]) -> int:
        """Read the keys of the files that count; returns how many there are."""
        self._by_name = self._by_name and not self._ledger.tells_content_apart()
        self._index = KeyIndex(self._ledger.read_keys(entries))
        return self._index.size

    def counts(self) -> Counts:
        """How many keys were committed, asked for and found so far."""
        return Counts(self._index.size, self._asked, self._found)

    def claim(self, claimant: Claimant, keys: bytes) -> bytes:
        """For each key of a block, whether a committed row stands for it, as packed bits.

        Raises:
            ValueError: when rows are committed and none of the first 10,000 asked for is among them, or when one value
                of the key column stands for rows that differ, and a committed row was taken for the wrong one.
        """
        count = len(keys) // KEY_BYTES
        # With the keys: a dataset put together from two that a processor made has two blocks of each number. And as a
        # digest: there may be millions of blocks.
        asked = hashlib.blake2b(keys, digest_size=16, key=repr(tuple(claimant)).encode()).digest()
        if asked not in self._answers:
            mask = self._take(keys)
            self._asked, self._found = self._asked + count, self._found + int(mask.sum())
            # Nearly all blocks are wholly done or wholly new: two shared words instead of a bit a row.
            self._answers[asked] = _NONE if not mask.any() else _ALL if mask.all() else np.packbits(mask).tobytes()
        if self._index.size and not self._found and self._asked >= _PROOF_ROWS:
            raise ValueError(nothing_matches(self.counts()))
        answer = self._answers[asked]
        return np.packbits(np.full(count, answer == _ALL)).tobytes() if answer in (_NONE, _ALL) else answer

    def write(self, file_number: int, numbers: bytes) -> None:
        """Take down the rows of a file that is about to be written; a repeated task's are the same.

        Raises:
            ValueError: when rows come a second time.
        """
        copies = np.count_nonzero(self._written.number(file_number, np.frombuffer(numbers, np.uint64)))
        if copies:
            raise ValueError(
                f"resume: {copies} rows came to the sink a second time: a step between the processor and the sink "
                "makes several rows of one (flat_map, a join, a union with itself), and which of them are done could "
                "not be told. Move that step before the processor, or do it on the files that the sink has written, "
                "or write without resume"
            )

    def _take(self, keys: bytes) -> Mask:
        try:
            return self._index.take(keys, by_name=self._by_name)
        except SharedNameError:
            self._ledger.tell_content_apart()
            raise ValueError(
                f"resume: key_column={self._key_column!r} has the same value in rows that differ, so it does not tell "
                "which of them is done. Run the job again: from now on rows of one key are told apart by the dataset's "
                "other columns too. Or give a column in which no value comes twice"
            ) from None


def nothing_matches(counts: Counts) -> str:
    """What to tell a user whose rows are all unlike those that are committed."""
    return (
        f"resume: none of the first {counts.asked} rows is among the {counts.committed} that are committed. Does "
        "preprocess make the same prompt and parameters in each run (no time, no random choice), and are the dataset's "
        "columns the same? If they cannot be, give ResumeConfig(key_column=...); if the job is another one, give it "
        "another path or another version"
    )


class BrokerHandle:
    """How a task asks the broker of its run."""

    def __init__(self, name: str, actor: Any) -> None:
        self.token = name.rpartition("-")[2].encode()
        self._actor = actor

    def claim(self, claimant: Claimant, keys: bytes) -> Mask:
        """See `ResumeBroker.claim`."""
        answer = _answer(self._actor.claim.remote(claimant, keys))
        bits = np.unpackbits(np.frombuffer(answer, np.uint8), count=len(keys) // KEY_BYTES)
        return bits.astype(np.bool_)

    def write(self, file_number: int, numbers: bytes) -> None:
        """See `ResumeBroker.write`."""
        _answer(self._actor.write.remote(file_number, numbers))


def _answer(ref: Any) -> Any:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def start_broker(ledger: Ledger, entries: Sequence[Entry], key_column: str | None) -> tuple[str, Any]:
    """Start a run's broker on this node; returns its name and the actor.

    Args:
        ledger: Of the run.
        entries: That count.
        key_column: The column that tells rows apart, if it is one.

    Raises:
        OSError: when the keys cannot be read, or kept on this node's disk.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"resume-broker-{ledger.run.token}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = (
        ray.remote(ResumeBroker)
        .options(name=name, namespace=_NAMESPACE, num_cpus=0, max_restarts=0, scheduling_strategy=here)
        .remote(ledger, key_column)
    )
    started = time.monotonic()
    try:
        count = ray.get(actor.load.remote(entries))
    except ray.exceptions.RayTaskError as error:
        ray.kill(actor)
        raise error.cause from None
    if count:
        seconds = time.monotonic() - started
        logger.info("%d rows in %d files are committed (keys read in %.1f s)", count, len(entries), seconds)
    return name, actor


def current_broker() -> BrokerHandle | None:
    """The broker of the run that this task belongs to; None when no sink of ours runs it."""
    from ray.data import DataContext

    name = DataContext.get_current().get_config(BROKER_SETTING)
    return None if name is None else _find(name)


@functools.lru_cache(maxsize=4)
def _find(name: str) -> BrokerHandle:
    import ray

    return BrokerHandle(name, ray.get_actor(name, namespace=_NAMESPACE))
