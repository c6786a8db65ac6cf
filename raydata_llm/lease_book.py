"""Which row is where: waiting, leased to a replica, or done; and how often each went down with one.

Owns the rows of all blocks in flight, how many a replica gets at once, and the search for a row that kills engines;
which go first is `waiting_rows.py`'s. Knows no Ray, no tokens and no model: rows are opaque cells with a cost. Any
thread may call.

Invariants: every row that was put is waiting, suspect, leased to one replica, or done; a block is complete when each of
its rows is done once, and what a replica that was given up says later of a row is ignored.

    put -> waiting --take--> leased --give--> done        (withdraw, from anywhere: forgotten)
              ^                 |
              +------lose-------+---> suspect: run in halves alone in a replica --> done, or quarantined
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raydata_llm.pending_rows import Block, Outcome, Quarantined, Row
from raydata_llm.waiting_rows import WaitingRows

# A replica's process that is lost with a row in it is a reason to suspect the row, an engine that says it died is two:
# rows on two lost replicas, or in one dead engine, are run apart from others. The same sum of those that the row caused
# alone proves it: one lone loss of a process could still be the node's doing.
PROCESS_LOST = 1
ENGINE_DIED = 2
_SUSPECT_FROM = 2
_PROVEN_FROM = 2
# One after the other, with no row done in between. The search for a row that kills engines loses up to
# log2(rows of a replica) + 2 in a row, and 2 more for each such row beside it; more than that is no row's doing.
_MOST_LOSSES_IN_VAIN = 24


class Lease(NamedTuple):
    """Rows for a replica, as (row id, cell)."""

    rows: list[tuple[int, Any]]


class Loss(NamedTuple):
    """What a lost replica had: so many rows, of which these are now proven to kill engines."""

    num_rows: int
    quarantined: list[Quarantined]


@dataclass(eq=False)
class _Holder:
    """A replica, as far as leases go.

    Args:
        num_slots: Rows that it runs at once.
        limit: Rows that it may have at once.
        changed: Notified when it may get rows, or was given up.
        rows: Those that it has, by their ids.
        alone: Whether these are suspects, which it runs apart from all others.
    """

    num_slots: int
    limit: int
    changed: threading.Condition
    rows: dict[int, Row] = field(default_factory=dict)
    alone: bool = False

    @property
    def room(self) -> int:
        return self.limit - len(self.rows)


class LeaseBook:
    """The rows of all blocks in flight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._waiting = WaitingRows()
        self._suspects: deque[list[Row]] = deque()
        self._examiner: int | None = None
        self._holders: dict[int, _Holder] = {}
        self._blocks: set[Block] = set()
        self._failure: BaseException | None = None
        self._losses_in_vain = self._most_holders = 0

    @property
    def num_waiting(self) -> int:
        """Rows that no replica has."""
        with self._lock:
            return len(self._waiting) + sum(map(len, self._suspects))

    @property
    def num_leased(self) -> int:
        """Rows that replicas have."""
        with self._lock:
            return sum(len(holder.rows) for holder in self._holders.values())

    @property
    def num_slots(self) -> int:
        """Rows that all replicas together run at once."""
        with self._lock:
            return self._count_slots()

    def put(self, cells: Sequence[Any], costs: Sequence[int], prefixes: Sequence[int] | None = None) -> Block:
        """Take in rows.

        Args:
            cells: What a replica is sent of each.
            costs: Tokens that each may write at most.
            prefixes: A number that rows which start alike share; 0 is none.
        """
        block = Block([None] * len(cells), len(cells))
        if not cells:
            block.done.set()
            return block
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._blocks.add(block)
            shared = prefixes or itertools.repeat(0, len(cells))
            for index, (cell, cost, prefix) in enumerate(zip(cells, costs, shared, strict=True)):
                self._waiting.push(Row(next(self._ids), cell, cost, prefix, block, index))
            self._notify(self._holders.values())
        return block

    def wait(self, block: Block, timeout: float | None = None) -> list[Outcome | Quarantined]:
        """The outcomes of a block, when all are there.

        Raises:
            Exception: what `fail` was told.
            TimeoutError: when they are not there in time.
        """
        if not block.done.wait(timeout):
            raise TimeoutError(f"{block.num_missing} rows of the block are not done")
        with self._lock:
            self._blocks.discard(block)
            if block.num_missing and self._failure is not None:
                raise self._failure
        return [outcome for outcome in block.outcomes if outcome is not None]

    def withdraw(self, block: Block) -> None:
        """Forget a block that nobody waits for any more; what a replica says later of its rows is ignored."""
        with self._lock:
            self._blocks.discard(block)
            self._waiting.withdraw(block)
            others = ([row for row in group if row.block is not block] for group in self._suspects)
            self._suspects = deque(group for group in others if group)
            for holder in self._holders.values():
                holder.rows = {number: row for number, row in holder.rows.items() if row.block is not block}
                holder.alone = holder.alone and bool(holder.rows)
            self._notify(self._holders.values())

    def fail(self, error: BaseException) -> None:
        """Give up: every caller of `wait`, present and later, gets the error."""
        with self._lock:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._waiting.clear()
        self._suspects.clear()
        for block in self._blocks:
            block.done.set()

    def join(self, replica: int, num_slots: int, limit: int) -> None:
        """A replica is ready to take rows.

        Args:
            replica: A number that no replica had before.
            num_slots: Rows that it runs at once.
            limit: Rows that it may have at once, those that wait in its engine included.
        """
        with self._lock:
            self._holders[replica] = _Holder(num_slots, limit, threading.Condition(self._lock))
            self._most_holders = max(self._most_holders, len(self._holders))

    def take(self, replica: int, timeout: float = 0.0) -> Lease | None:
        """Rows for a replica, costly ones first; empty when there are none in time, None once it was given up."""
        with self._lock:
            holder = self._holders.get(replica)
            if holder is None:
                return None
            rows = self._pick(replica, holder)
            if not rows and timeout:
                holder.changed.wait(timeout)
                rows = self._pick(replica, holder) if replica in self._holders else []
            holder.rows |= {row.row_id: row for row in rows}
            return Lease([(row.row_id, row.cell) for row in rows])

    def holds(self, replica: int) -> bool:
        """Whether a replica has rows."""
        with self._lock:
            holder = self._holders.get(replica)
            return holder is not None and bool(holder.rows)

    def give(self, replica: int, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Rows that a replica has done; returns those that count."""
        counted = []
        with self._lock:
            holder = self._holders.get(replica)
            if holder is None:
                return []
            for outcome in outcomes:
                row = holder.rows.pop(outcome.row_id, None)
                if row is not None:
                    row.block.settle(row.index, outcome)
                    counted.append(outcome)
                    self._losses_in_vain = 0
                    self._waiting.advance(outcome.num_tokens / self._count_slots())
            if not holder.rows:
                holder.alone = False
            self._notify([holder])
        return counted

    def lose(self, replica: int, blame: int, cause: str) -> Loss:
        """A replica is no more: its rows go to others.

        Args:
            replica: From now on what it says is ignored.
            blame: PROCESS_LOST or ENGINE_DIED, or 0 where its rows have nothing to do with it.
            cause: Said of rows that are quarantined.
        """
        with self._lock:
            holder = self._holders.pop(replica, None)
            if holder is None:
                return Loss(0, [])
            if self._examiner == replica:
                self._examiner = None
            rows = list(holder.rows.values())
            for row in rows:
                row.blame += blame
            quarantined = []
            if holder.alone and blame and rows:
                quarantined = self._examine(rows, blame, cause)
            else:
                self._take_back(rows)
            self._losses_in_vain += 1
            if self._losses_in_vain > max(_MOST_LOSSES_IN_VAIN, 4 * self._most_holders):
                self._fail(
                    RuntimeError(f"{self._losses_in_vain} replicas were lost and no row was done, last: {cause}")
                )
            self._notify([*self._holders.values(), holder])
            return Loss(len(rows), quarantined)

    def _examine(self, rows: list[Row], blame: int, cause: str) -> list[Quarantined]:
        """A replica died of these rows alone: halve them, or convict the only one."""
        if len(rows) > 1:
            half = len(rows) // 2
            self._suspects.extendleft([rows[half:], rows[:half]])
            return []
        [row] = rows
        row.lone_blame += blame
        if row.lone_blame < _PROVEN_FROM:
            self._suspects.appendleft([row])
            return []
        quarantined = Quarantined(row.row_id, cause)
        row.block.settle(row.index, quarantined)
        return [quarantined]

    def _take_back(self, rows: list[Row]) -> None:
        """Rows of a lost replica wait again, those that are suspect apart from the others."""
        suspects = [row for row in rows if row.blame >= _SUSPECT_FROM]
        # The whole of them just died together.
        half = (len(suspects) + 1) // 2
        self._suspects.extend(group for group in (suspects[:half], suspects[half:]) if group)
        for row in rows:
            if row.blame < _SUSPECT_FROM:
                self._waiting.push(row)

    def _pick(self, replica: int, holder: _Holder) -> list[Row]:
        if holder.alone or self._failure is not None:
            return []
        if self._suspects and self._examiner in (None, replica):
            # One replica at a time runs empty for them, the others go on.
            self._examiner = replica
            if holder.rows:
                return []
            holder.alone = True
            rows = self._suspects.popleft()
            if not self._suspects:
                self._examiner = None
            return rows
        # Dealt in small hands, an eighth of what the replica runs at once, so that replicas which start together share
        # the costly rows.
        hand = max(1, min(holder.num_slots, holder.limit) // 8)
        return [] if holder.room < hand else self._waiting.deal(hand, holder.room)

    def _count_slots(self) -> int:
        return sum(holder.num_slots for holder in self._holders.values())

    def _notify(self, holders: Iterable[_Holder]) -> None:
        for holder in holders:
            holder.changed.notify_all()
