"""Rows that wait for a replica, in the order in which they should go.

Owns that order: costly rows first, within limits, and rows that start alike side by side. Knows no replicas. Used under
the lease book's lock.
"""

from __future__ import annotations

import heapq

from raydata_llm.pending_rows import Block, Row


class WaitingRows:
    """See the module's docstring."""

    def __init__(self) -> None:
        # By urgency; a row that went with its prefix's others leaves an entry behind.
        self._heap: list[tuple[float, int, Row]] = []
        self._num_rows = 0
        self._by_prefix: dict[int, dict[int, Row]] = {}
        self._clock = 0.0

    def __len__(self) -> int:
        return self._num_rows

    def push(self, row: Row) -> None:
        """Let a row wait."""
        # Costly rows go first, so that they don't make the tail, but overtake only those that came up to their cost in
        # steps ago: no row waits for ever, and no block for its cheapest row.
        heapq.heappush(self._heap, (self._clock - row.cost, row.row_id, row))
        row.is_waiting = True
        self._num_rows += 1
        if row.prefix:
            self._by_prefix.setdefault(row.prefix, {})[row.row_id] = row

    def deal(self, hand: int, room: int) -> list[Row]:
        """Take the most urgent rows, each with those of its prefix where all of them fit.

        Args:
            hand: Rows that are enough; no prefix's rows that are more than that are kept together.
            room: Rows at most; no less than `hand`.
        """
        dealt: list[Row] = []
        while self._heap and len(dealt) < hand:
            entry = heapq.heappop(self._heap)
            row = entry[2]
            if not row.is_waiting:
                continue
            # A prefix of more rows than a hand is worth computing on several replicas.
            group = list(self._by_prefix[row.prefix].values()) if row.prefix else [row]
            group = group if len(group) <= hand else [row]
            if dealt and len(dealt) + len(group) > room:
                heapq.heappush(self._heap, entry)
                break
            dealt += [self._pop(one) for one in group]
        return dealt

    def advance(self, steps: float) -> None:
        """Replicas have made so many steps more, each in all its slots."""
        self._clock += steps

    def withdraw(self, block: Block) -> None:
        """Forget a block's rows."""
        for _, _, row in self._heap:
            if row.block is block and row.is_waiting:
                self._pop(row)

    def clear(self) -> None:
        """Forget all rows."""
        self._heap.clear()
        self._by_prefix.clear()
        self._num_rows = 0

    def _pop(self, row: Row) -> Row:
        """A waiting row leaves; its entry in the heap goes when it comes up."""
        row.is_waiting = False
        self._num_rows -= 1
        if row.prefix:
            group = self._by_prefix[row.prefix]
            del group[row.row_id]
            if not group:
                del self._by_prefix[row.prefix]
        return row
