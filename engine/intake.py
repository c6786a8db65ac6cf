"""Prompts on their way into the batch: which waiting sequences get a slot, and which of their tokens a step computes.

Owns the waiting queue, what a running sequence holds besides its blocks (its adapter's slot and its row of penalty
counts), and which blocks it shares with others by prefix. Knows no tensors. Sequences are admitted in bursts, so that
most steps are pure decode, which the runner has graphs for. Invariant: a sequence that lacks an adapter's slot or a row
of counts holds back only those that lack the same.
"""

from __future__ import annotations

import numpy as np

from raydata_llm.engine.adapter_pool import AdapterPool
from raydata_llm.engine.admission import Admission
from raydata_llm.engine.block_manager import BlockArray, BlockManager
from raydata_llm.engine.length_model import LengthModel
from raydata_llm.engine.prefix_cache import ROOT
from raydata_llm.engine.request import LoRARequest
from raydata_llm.engine.row_target import RowTarget
from raydata_llm.engine.scheduler_limits import SchedulerLimits
from raydata_llm.engine.sequence import Sequence, SequenceTable
from raydata_llm.engine.waiting_queue import WaitingQueue

# Waiting sequences are looked at when this share of the decoding ones has ended since the last time.
_BURST_SHARE = 1 / 32
_PENALTIES = "penalties"

Chunk = tuple[int, int, int]  # slot, first token, number of tokens


class Intake:
    """See the module's docstring.

    Args:
        limits: Budgets.
        table: The slots.
        blocks: The block pool.
        lengths: What is known of lengths.
        row_target: How many rows to run where memory holds some of them.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        table: SequenceTable,
        blocks: BlockManager,
        lengths: LengthModel,
        row_target: RowTarget,
    ) -> None:
        self.adapters = AdapterPool(limits.max_loras)
        self.num_waiting = 0
        self._limits = limits
        self._table = table
        self._blocks = blocks
        self._lengths = lengths
        self._row_target = row_target
        self._block_bytes = limits.block_size * table.token_ids.itemsize
        self._waiting = WaitingQueue(limits.block_size)
        self._num_admissions = 0
        self._num_penalty_seqs = 0
        # Whether waiting sequences are to be looked at now, and how many were released since they were.
        self._is_due = False
        self._num_released = 0

    def push(self, sequence: Sequence) -> None:
        """Take a new sequence."""
        self._waiting.push(sequence)
        self.num_waiting += 1
        self._is_due = True

    def push_preempted(self, sequence: Sequence) -> None:
        """Take back a sequence that was preempted, and released."""
        self._waiting.push_preempted(sequence)
        self.num_waiting += 1
        # What was just sent away would otherwise come straight back and be computed again for nothing.
        self._is_due, self._num_released = False, 0

    def release(self, sequence: Sequence) -> None:
        """A sequence left its slot: what it held besides its blocks is free."""
        self.adapters.release(sequence.request.lora_request)
        self._num_penalty_seqs -= _uses_penalties(sequence)
        self._num_released += 1

    def abort(self, request_ids: set[str]) -> list[Sequence]:
        """Drop the waiting sequences of these requests."""
        waiting = self._waiting.sequences()
        dropped = [sequence for sequence in waiting if sequence.request.request_id in request_ids]
        for sequence in dropped:
            sequence.aborted = True  # it stays in the queue, which does not show it
        # Counted, not subtracted: of a request that was half taken in, the last may be in the queue alone.
        self.num_waiting = len(waiting) - len(dropped)
        return dropped

    def continue_prefills(self, lane: int, budget: int) -> tuple[list[Chunk], int]:
        """Chunks of prompts that are part-way, oldest first, and what is left of the budget."""
        table = self._table
        part_way = (table.seq_id >= 0) & (table.num_computed < table.prefill_end) & (table.lane == lane)
        slots = np.flatnonzero(part_way)
        chunks = []
        for slot in slots[np.argsort(table.admission[slots])].tolist():
            count = min(int(table.prefill_end[slot] - table.num_computed[slot]), budget)
            if count:
                chunks.append((slot, int(table.num_computed[slot]), count))
                budget -= count
        return chunks, budget

    def is_due(self, num_decodes: int) -> bool:
        """Whether enough has changed for another burst of admissions."""
        return self.num_waiting > 0 and (self._is_due or self._num_released >= _BURST_SHARE * num_decodes)

    def admit(
        self, lane: int, budget: int, chunks: list[Chunk], *, anything_scheduled: bool
    ) -> list[tuple[int, Sequence]]:
        """Admit waiting sequences while budget, slots and the simulated peak allow.

        Args:
            lane: Whose step it is.
            budget: Tokens that the step has left.
            chunks: Those of the admitted are added.
            anything_scheduled: Whether the step has other work; without chunked prefill, only a prompt that is alone in
                its step may be cut.

        Returns:
            The slots that were filled, and with what.
        """
        admitted: list[tuple[int, Sequence]] = []
        admission = Admission(self._table, self._blocks, self._lengths)
        self._num_released = 0
        self._is_due = False
        self._bring_back()
        num_free = self._free_slots_in(lane)
        while budget > 0 and len(admitted) < num_free:
            sequence = self._next()
            if sequence is None:
                return admitted
            cached, node = self._cached_blocks(sequence)
            start = len(cached) * self._limits.block_size
            rest = len(sequence.token_ids) - start
            if rest > budget and not self._limits.enable_chunked_prefill and (anything_scheduled or admitted):
                break
            if self._has_enough(admission, sequence, len(cached)):
                return admitted
            if not admission.fits(sequence, len(cached), self._blocks.num_evictable(cached)):
                return admitted
            slot = self._occupy(self._waiting.pop(), lane, cached, node)
            admitted.append((slot, sequence))
            count = min(rest, budget)
            chunks.append((slot, start, count))
            budget -= count
            # Now, not after the step: within a layer KV is written before attention reads it, so rows admitted
            # later in this same step share these blocks already.
            self.register_blocks(slot, start + count)
        # The step is full, or the slots are: with slots free, the next step goes on.
        self._is_due = self._table.num_free_slots > 0
        return admitted

    def _has_enough(self, admission: Admission, sequence: Sequence, num_cached: int) -> bool:
        """Whether no more rows should run in this round, although there is memory for some.

        Rows that end one by one make room one by one, and what fits is best; those that end together come in rounds. Of
        rows that may stop early nobody knows that they will.
        """
        running = self._table.num_running
        if not running or sequence.may_stop:
            return False
        fitting, total = running + admission.num_fitting(sequence, num_cached), running + self.num_waiting
        if fitting >= self._limits.max_num_seqs or not running >= self._row_target.of(fitting, total) < fitting:
            return False
        return admission.ends_with_others(sequence)

    def register_blocks(self, slot: int, num_computed: int) -> None:
        """Let others share the slot's full blocks, as far as their tokens were known when it was admitted."""
        table, width = self._table, self._block_bytes
        sequence = table.sequences[slot]
        if sequence is None or sequence.token_bytes is None:
            return
        tokens = sequence.token_bytes
        first = int(table.num_registered_blocks[slot])
        last = min(num_computed // self._limits.block_size, len(tokens) // width)
        if last <= first:
            return
        node = int(table.prefix_node[slot])
        for index, block in enumerate(table.block_table[slot, first:last].tolist(), start=first):
            node = self._blocks.register(block, node, tokens[index * width : (index + 1) * width])
        table.prefix_node[slot], table.num_registered_blocks[slot] = node, last

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        running = [sequence for sequence in self._table.sequences if sequence is not None]
        assert self.num_waiting == len(self._waiting.sequences())
        assert self._num_penalty_seqs == sum(map(_uses_penalties, running)) <= self._limits.max_penalty_seqs
        self.adapters.check_integrity()

    def _next(self) -> Sequence | None:
        """The next sequence that lacks no adapter's slot and no row of counts."""
        while (sequence := self._waiting.peek()) is not None:
            adapter = sequence.request.lora_request
            if not self.adapters.has_room(adapter):
                self._waiting.set_aside(adapter)
            elif _uses_penalties(sequence) and self._num_penalty_seqs >= self._limits.max_penalty_seqs:
                self._waiting.set_aside(_PENALTIES)
            else:
                return sequence
        return None

    def _bring_back(self) -> None:
        """Let those wait in line again who lack nothing any more: of adapters only as many as have room."""
        room = self.adapters.num_available
        for lack in self._waiting.lacks():
            if not isinstance(lack, LoRARequest):
                if self._num_penalty_seqs < self._limits.max_penalty_seqs:
                    self._waiting.bring_back(lack)
            elif self.adapters.has(lack):
                self._waiting.bring_back(lack)
            elif room:
                self._waiting.bring_back(lack)
                room -= 1

    def _free_slots_in(self, lane: int) -> int:
        free, lanes = self._table.num_free_slots, self._limits.num_lanes
        if lanes == 1:
            return free
        # No lane takes more than its share: the others are to have as much work.
        sharing = min(self._limits.max_num_seqs, self._table.num_running + self.num_waiting)
        return min(free, -(-sharing // lanes) - self._table.num_running_in(lane))

    def _cached_blocks(self, sequence: Sequence) -> tuple[BlockArray, int]:
        """The blocks of the longest cached prefix of a waiting sequence, and its node."""
        if not self._limits.enable_prefix_caching:
            return np.zeros(0, dtype=np.int32), ROOT
        if sequence.token_bytes is None:
            sequence.token_bytes = sequence.token_ids.tobytes()
        # The last known token is always computed: its hidden state is sampled from.
        limit = (len(sequence.token_ids) - 1) // self._limits.block_size
        if sequence.lacks_prompt_logprobs:
            limit = min(limit, sequence.first_asked // self._limits.block_size)
        if sequence.request.sampling_params.skip_reading_prefix_cache:
            limit = 0
        root = self.adapters.root(sequence.request.lora_request)
        return self._blocks.match(sequence.token_bytes, self._block_bytes, limit, root)

    def _occupy(self, sequence: Sequence, lane: int, cached: BlockArray, node: int) -> int:
        self._blocks.share(cached)
        num_blocks = -(-len(sequence.token_ids) // self._limits.block_size)
        blocks: BlockArray = np.concatenate([cached, self._blocks.allocate(num_blocks - len(cached))])
        slot = self._table.occupy(
            sequence, blocks, num_shared=len(cached), node=node, admission=self._num_admissions, lane=lane
        )
        self._table.adapter[slot] = self.adapters.acquire(sequence.request.lora_request)
        sequence.num_cached_tokens = max(sequence.num_cached_tokens, len(cached) * self._limits.block_size)
        self._num_admissions += 1
        self._num_penalty_seqs += _uses_penalties(sequence)
        self.num_waiting -= 1
        return slot


def _uses_penalties(sequence: Sequence) -> bool:
    params = sequence.request.sampling_params
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
