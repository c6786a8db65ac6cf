"""The rows of blocks in flight, as whoever leads them to replicas sees them, and what became of each.

Plain data; knows no order and no replica. Invariant: each row of a block is settled once, and the block is done with
the last of them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What became of a row: the packed output, why it failed if it did, and how many tokens were written."""

    row_id: int
    cell: bytes
    error: str | None = None
    num_tokens: int = 0


class Quarantined(NamedTuple):
    """A row that kills engines."""

    row_id: int
    cause: str


@dataclass(eq=False)
class Block:
    """Rows that came together and are waited for together; `outcomes` is in their order."""

    outcomes: list[Outcome | Quarantined | None]
    num_missing: int
    done: threading.Event = field(default_factory=threading.Event)

    def settle(self, index: int, outcome: Outcome | Quarantined) -> None:
        """Take what became of one of its rows; the last one wakes whoever waits."""
        self.outcomes[index] = outcome
        self.num_missing -= 1
        if self.num_missing == 0:
            self.done.set()


@dataclass(eq=False, slots=True)
class Row:
    """A row that is not done.

    Args:
        row_id: Its number in the job.
        cell: What a replica is sent of it.
        cost: Tokens that it may write at most.
        prefix: A number that rows which start alike share; 0 is none.
        block: Whose it is.
        index: Its place there.
        blame: What it is suspected of, see `lease_book.py`.
        lone_blame: The same, of what died when it was there alone.
        is_waiting: Whether no replica has it, and it is not suspect.
    """

    row_id: int
    cell: Any
    cost: int
    prefix: int
    block: Block
    index: int
    blame: int = 0
    lone_blame: int = 0
    is_waiting: bool = False
