"""Sequences that wait to run, in the order in which they should.

Owns their order. Knows no slots and no blocks: the intake says what a sequence lacks, and the queue keeps it aside
until there is some of it again, so that it holds nobody else back. Invariant: an aborted sequence is never shown.
"""

from __future__ import annotations

import heapq
import zlib
from collections import deque
from collections.abc import Hashable

from raydata_llm.engine.sequence import Sequence

# Blocks from the start over which waiting prompts are compared.
_PREFIX_BLOCKS = (1, 4, 16, 64)

_Entry = tuple[tuple[int, ...], Sequence]


class WaitingQueue:
    """Preempted ones first, then those that may write most (they would make the tail).

    Among sequences whose outputs are alike within a factor of two, those with one adapter come together, and of these
    those whose prompts begin alike: they share blocks, and attention over them.
    """

    def __init__(self, block_size: int) -> None:
        self._prefixes = [count * block_size for count in _PREFIX_BLOCKS]
        self._preempted: deque[Sequence] = deque()
        self._fresh: list[_Entry] = []
        self._aside: dict[Hashable, list[_Entry]] = {}

    def push(self, sequence: Sequence) -> None:
        """Add a new sequence."""
        max_outputs = sequence.max_tokens - sequence.num_prompt
        prefixes = (zlib.crc32(sequence.token_ids[:length].data) for length in self._prefixes)
        adapter = sequence.request.lora_request
        group = 0 if adapter is None else zlib.crc32(adapter.lora_path.encode())
        key = (-max_outputs.bit_length(), group, *prefixes, -max_outputs, sequence.seq_id)
        heapq.heappush(self._fresh, (key, sequence))

    def push_preempted(self, sequence: Sequence) -> None:
        """Put a preempted sequence before all others."""
        self._preempted.appendleft(sequence)

    def peek(self) -> Sequence | None:
        """The next sequence, without taking it."""
        while self._preempted and self._preempted[0].aborted:
            self._preempted.popleft()
        while self._fresh and self._fresh[0][1].aborted:
            heapq.heappop(self._fresh)
        return self._preempted[0] if self._preempted else self._fresh[0][1] if self._fresh else None

    def pop(self) -> Sequence:
        """Take the sequence that `peek` showed."""
        return self._pop_entry()[1]

    def set_aside(self, lack: Hashable) -> None:
        """Let the sequence that `peek` showed wait for what it lacks; the next one is shown then."""
        self._aside.setdefault(lack, []).append(self._pop_entry())

    def lacks(self) -> list[Hashable]:
        """What sequences were set aside for, in the order in which their first ones should run."""
        return sorted(self._aside, key=lambda lack: self._aside[lack][0][0])

    def bring_back(self, lack: Hashable) -> None:
        """Let those that were set aside for it take their places again."""
        for entry in self._aside.pop(lack):
            heapq.heappush(self._fresh, entry)

    def sequences(self) -> list[Sequence]:
        """All that wait, in no particular order."""
        aside = (entry[1] for entries in self._aside.values() for entry in entries)
        waiting = [*self._preempted, *(entry[1] for entry in self._fresh), *aside]
        return [sequence for sequence in waiting if not sequence.aborted]

    def _pop_entry(self) -> _Entry:
        if not self._preempted:
            return heapq.heappop(self._fresh)
        sequence = self._preempted.popleft()
        return (-sequence.max_tokens.bit_length() - 64, sequence.seq_id), sequence
