"""Decides, step by step, which tokens of which sequences are computed.

Owns the waiting queue, the slots and their blocks, and how a sequence ends. Knows no tensors and no device: it is
pure host code over NumPy arrays, tested without a model.

A step takes every decoding sequence, then goes on with prompts that are part-way, then admits waiting ones while the
simulated peak of block use fits: in bursts, so that most steps are pure decode, which the runner has graphs for.
Steps may be launched before the tokens of earlier ones are read: a launched step counts one token for each row it
samples (`num_tokens`), and an end that is only seen in a token (EOS, a stop string) is noticed late. Invariants: blocks
of sequences in slots are theirs until the sequence is finished, preempted or aborted; only steps launched later can be
given them; preemption happens with no step in flight.

A pipeline has as many steps in flight as stages, none of which waits for another's tokens: sequences are divided into
lanes, one a stage, and steps take the lanes in turn.
"""

from __future__ import annotations

import heapq
import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.adapter_pool import AdapterPool
from raydata_llm.engine.admission import Admission, forecast
from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.block_manager import BlockArray, BlockManager
from raydata_llm.engine.decode_plan import DecodePlan, plan_decode
from raydata_llm.engine.length_model import LengthModel
from raydata_llm.engine.prefix_cache import ROOT
from raydata_llm.engine.request import FinishReason
from raydata_llm.engine.sequence import FinishedSequence, IntArray, Sequence, SequenceTable

_NO_INTS = np.zeros(0, dtype=np.int32)
# Waiting sequences are looked at when this share of the decoding ones has ended since the last time.
_BURST_SHARE = 1 / 32
# Blocks from the start over which waiting prompts are compared.
_PREFIX_BLOCKS = (1, 4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What a step and the whole engine may use at most.

    Args:
        max_num_seqs: Running sequences.
        max_num_batched_tokens: Tokens of a step; at least `max_num_seqs`.
        max_model_len: Tokens of a sequence.
        block_size: Tokens of a block.
        max_penalty_seqs: Running sequences with penalties (their token counts live in a pool of this many rows).
        enable_chunked_prefill: Whether a prompt may be computed over several steps.
        enable_prefix_caching: Whether equal prefixes share blocks.
        share_prefixes: Whether decode rows with a common prefix are grouped.
        num_lanes: Groups of sequences that take turns.
        max_loras: Adapters at once.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    max_penalty_seqs: int
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    share_prefixes: bool = False
    num_lanes: int = 1
    max_loras: int = 0


class WaitingQueue:
    """Sequences that wait: preempted ones first, then those that may write most (they would make the tail).

    Among sequences whose outputs are alike within a factor of two, those with one adapter come together, and of these
    those whose prompts begin alike: they share blocks, and attention over them.
    """

    def __init__(self, block_size: int) -> None:
        self._prefixes = [count * block_size for count in _PREFIX_BLOCKS]
        self._preempted: deque[Sequence] = deque()
        self._fresh: list[tuple[tuple[int, ...], Sequence]] = []

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
        return self._preempted.popleft() if self._preempted else heapq.heappop(self._fresh)[1]

    def sequences(self) -> list[Sequence]:
        """All that wait, in no particular order."""
        waiting = [*self._preempted, *(entry[1] for entry in self._fresh)]
        return [sequence for sequence in waiting if not sequence.aborted]


class Scheduler:
    """See the module's docstring.

    Args:
        limits: Budgets.
        blocks: The block pool; must hold at least one sequence of `max_model_len`.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.table = SequenceTable(limits.max_num_seqs, limits.max_model_len, limits.block_size)
        self.lengths = LengthModel()
        self._block_bytes = limits.block_size * self.table.token_ids.itemsize
        self.waiting = WaitingQueue(limits.block_size)
        self.adapters = AdapterPool(limits.max_loras)
        self.num_waiting = 0
        self.num_preemptions = 0
        self._num_admissions = 0
        self._num_penalty_seqs = 0
        # Whether waiting sequences are to be looked at now, and how many were released since they were.
        self._admission_is_due = False
        self._num_released = 0
        self._released: list[int] = []
        self._lane = 0
        self._num_plans = limits.num_lanes
        self._decoding = [np.zeros(limits.max_num_seqs, dtype=bool) for _ in range(limits.num_lanes)]
        self._plans = [self._plan_of(_NO_INTS, version=lane) for lane in range(limits.num_lanes)]

    def add(self, sequence: Sequence) -> None:
        """Take a new sequence, whose tokens fit `max_model_len`."""
        self.waiting.push(sequence)
        self.num_waiting += 1
        self._admission_is_due = True

    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return self.num_waiting > 0 or self.table.num_running > 0

    def schedule(self, num_in_flight: int) -> ScheduledBatch | None:
        """Choose the next step's work.

        Args:
            num_in_flight: Steps launched whose tokens `update` has not seen.

        Returns:
            None if there is nothing to launch before a step in flight is read.
        """
        for _ in range(self.limits.num_lanes):
            batch = self._schedule_lane(num_in_flight)
            self._lane = (self._lane + 1) % self.limits.num_lanes
            if batch is not None:
                return batch
        return None

    def _schedule_lane(self, num_in_flight: int) -> ScheduledBatch | None:
        plan = self._decode_plan()
        while self._missing_decode_blocks(plan.slots) > 0:
            if num_in_flight:
                return None
            self._preempt(self._latest_admitted())
            plan = self._decode_plan()
        budget = self.limits.max_num_batched_tokens - len(plan.slots)
        grown = self._grow(plan.slots)
        chunks, budget = self._continue_prefills(budget)
        admitted: list[tuple[int, Sequence]] = []
        if self._looks_at_waiting(len(plan.slots)):
            admitted = self._admit(budget, chunks, anything_scheduled=bool(len(plan.slots) or chunks))
        if not len(plan.slots) and not chunks:
            return None
        return self._launch(plan, chunks, grown, admitted)

    def update(self, batch: ScheduledBatch, token_ids: IntArray) -> list[FinishedSequence]:
        """Take in a launched step's sampled tokens, in launch order, and return the sequences that ended.

        Args:
            token_ids: [N] as `batch.sample_slots`.
        """
        table = self.table
        live = table.seq_id[batch.sample_slots] == batch.sample_seq_ids
        slots, tokens = batch.sample_slots[live], token_ids[live]
        table.token_ids[slots, table.num_known[slots]] = tokens
        table.num_known[slots] += 1
        known = table.num_known[slots]
        stopped = (tokens[:, None] == table.stop_ids[slots]).any(axis=1) & (known > table.min_tokens[slots])
        ended = stopped | (known >= table.max_tokens[slots])
        finished = []
        for row in np.flatnonzero(ended | table.watched[slots]).tolist():
            slot = int(slots[row])
            guide_end = None if stopped[row] else self._advance_guides(slot, int(tokens[row]))
            text_end = None if stopped[row] else self._stop_string(slot)
            if guide_end == "error":
                finished.append(self._finish(slot, "error", None))
            elif text_end is not None:
                finished.append(self._finish(slot, "stop", text_end))
            elif stopped[row] or guide_end:
                finished.append(self._finish(slot, "stop", self._stop_token(slot, int(tokens[row]))))
            elif ended[row]:
                finished.append(self._finish(slot, "length", None))
        return finished

    def abort(self, request_ids: set[str]) -> list[FinishedSequence]:
        """End all sequences of these requests now, with what was read of them."""
        finished = []
        for sequence in self.waiting.sequences():
            if sequence.request.request_id in request_ids:
                sequence.aborted = True
                self.num_waiting -= 1
                outputs = sequence.token_ids[sequence.num_prompt :].tolist()
                finished.append(FinishedSequence(sequence, outputs, "abort", None))
        for slot in self.table.running().tolist():
            if self._sequence(slot).request.request_id in request_ids:
                finished.append(self._finish(slot, "abort", None))
        return finished

    def simulated_peak(self) -> int:
        """Blocks held at the predicted peak of all that runs."""
        return forecast(self.table, self.blocks, self.lengths).peak

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        table = self.table
        slots = table.running()
        assert len(slots) == table.num_running <= self.limits.max_num_seqs
        assert len({int(seq_id) for seq_id in table.seq_id[slots]}) == len(slots)
        assert (table.num_known[slots] <= table.num_tokens[slots]).all()
        assert (table.num_tokens[slots] <= table.max_tokens[slots]).all()
        assert (table.num_computed[slots] < table.num_tokens[slots]).all()
        assert (table.num_computed[slots] <= table.num_blocks[slots] * self.limits.block_size).all()
        assert self.num_waiting == len(self.waiting.sequences())
        assert self._num_penalty_seqs == sum(_uses_penalties(self._sequence(slot)) for slot in slots.tolist())
        self.adapters.check_integrity()
        self.blocks.check_integrity([table.blocks(slot) for slot in slots.tolist()])

    # Decode

    def _decode_plan(self) -> DecodePlan:
        """The rows that decode; the last step's plan as long as they are the same."""
        table = self.table
        decoding = (table.num_computed >= table.prefill_end) & (table.num_tokens < table.max_tokens)
        decoding &= (table.seq_id >= 0) & (table.lane == self._lane)
        # A slot that changes hands is out for at least the step of its new sequence's prefill.
        if not np.array_equal(decoding, self._decoding[self._lane]):
            self._decoding[self._lane] = decoding
            self._plans[self._lane] = self._plan_of(np.flatnonzero(decoding).astype(np.int32), self._num_plans)
            self._num_plans += 1
        return self._plans[self._lane]

    def _plan_of(self, slots: IntArray, version: int) -> DecodePlan:
        table = self.table
        widest = int(table.num_blocks[slots].max(initial=0))
        return plan_decode(
            version,
            slots,
            table.block_table[slots, :widest],
            table.num_blocks[slots],
            table.num_tokens[slots],
            self.limits.block_size,
            share_prefixes=self.limits.share_prefixes,
        )

    def _needs_block(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self.table.num_computed[slots] >= (
            self.table.num_blocks[slots] * self.limits.block_size
        )
        return held

    def _missing_decode_blocks(self, decode_slots: IntArray) -> int:
        return int(self._needs_block(decode_slots).sum()) - self.blocks.num_available

    def _grow(self, decode_slots: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Give a block to each decode row that starts one; returns (slots, columns, blocks)."""
        slots = decode_slots[self._needs_block(decode_slots)]
        blocks = self.blocks.allocate(len(slots))
        columns = self.table.num_blocks[slots]
        self.table.block_table[slots, columns] = blocks
        self.table.num_blocks[slots] += 1
        return slots, columns, blocks

    # Prefill and admission

    def _continue_prefills(self, budget: int) -> tuple[list[tuple[int, int, int]], int]:
        """Chunks (slot, start, count) of prompts that are part-way, oldest first, and what is left of the budget."""
        table = self.table
        part_way = (table.seq_id >= 0) & (table.num_computed < table.prefill_end) & (table.lane == self._lane)
        slots = np.flatnonzero(part_way)
        chunks = []
        for slot in slots[np.argsort(table.admission[slots])].tolist():
            count = min(int(table.prefill_end[slot] - table.num_computed[slot]), budget)
            if count:
                chunks.append((slot, int(table.num_computed[slot]), count))
                budget -= count
        return chunks, budget

    def _looks_at_waiting(self, num_decodes: int) -> bool:
        """Whether enough has changed for another burst of admissions."""
        return self.num_waiting > 0 and (self._admission_is_due or self._num_released >= _BURST_SHARE * num_decodes)

    def _admit(
        self, budget: int, chunks: list[tuple[int, int, int]], *, anything_scheduled: bool
    ) -> list[tuple[int, Sequence]]:
        """Admit waiting sequences while budget, slots and the simulated peak allow; adds their chunks to `chunks`."""
        admitted: list[tuple[int, Sequence]] = []
        admission = Admission(self.table, self.blocks, self.lengths)
        self._num_released = 0
        self._admission_is_due = False
        num_free = self._free_slots_in_lane()
        while budget > 0 and len(admitted) < num_free:
            sequence = self.waiting.peek()
            if sequence is None:
                return admitted
            cached, node = self._cached_blocks(sequence)
            start = len(cached) * self.limits.block_size
            rest = len(sequence.token_ids) - start
            if rest > budget and not self.limits.enable_chunked_prefill and (anything_scheduled or admitted):
                break
            if _uses_penalties(sequence) and self._num_penalty_seqs >= self.limits.max_penalty_seqs:
                return admitted
            if not self.adapters.has_room(sequence.request.lora_request):
                return admitted
            if not admission.fits(sequence, len(cached), self.blocks.num_evictable(cached)):
                return admitted
            slot = self._occupy(self.waiting.pop(), cached, node)
            admitted.append((slot, sequence))
            count = min(rest, budget)
            chunks.append((slot, start, count))
            budget -= count
            # Now, not after the step: within a layer KV is written before attention reads it, so rows admitted
            # later in this same step share these blocks already.
            self._register_blocks(slot, start + count)
        # The step is full, or the slots are: with slots free, the next step goes on.
        self._admission_is_due = self.table.num_free_slots > 0
        return admitted

    def _free_slots_in_lane(self) -> int:
        free, lanes = self.table.num_free_slots, self.limits.num_lanes
        if lanes == 1:
            return free
        # No lane takes more than its share: the others are to have as much work.
        sharing = min(self.limits.max_num_seqs, self.table.num_running + self.num_waiting)
        return min(free, -(-sharing // lanes) - self.table.num_running_in(self._lane))

    def _cached_blocks(self, sequence: Sequence) -> tuple[BlockArray, int]:
        """The blocks of the longest cached prefix of a waiting sequence, and its node."""
        if not self.limits.enable_prefix_caching:
            return _NO_INTS, ROOT
        if sequence.token_bytes is None:
            sequence.token_bytes = sequence.token_ids.tobytes()
        # The last known token is always computed: its hidden state is sampled from.
        limit = (len(sequence.token_ids) - 1) // self.limits.block_size
        if sequence.lacks_prompt_logprobs or sequence.request.sampling_params.skip_reading_prefix_cache:
            limit = 0
        root = self.adapters.root(sequence.request.lora_request)
        return self.blocks.match(sequence.token_bytes, self._block_bytes, limit, root)

    def _occupy(self, sequence: Sequence, cached: BlockArray, node: int) -> int:
        self.blocks.share(cached)
        fresh = self.blocks.allocate(self._num_blocks(len(sequence.token_ids)) - len(cached))
        blocks: BlockArray = np.concatenate([cached, fresh])
        slot = self.table.occupy(
            sequence, blocks, num_shared=len(cached), node=node, admission=self._num_admissions, lane=self._lane
        )
        self.table.adapter[slot] = self.adapters.acquire(sequence.request.lora_request)
        sequence.num_cached_tokens = max(sequence.num_cached_tokens, len(cached) * self.limits.block_size)
        self._num_admissions += 1
        self._num_penalty_seqs += _uses_penalties(sequence)
        self.num_waiting -= 1
        return slot

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _register_blocks(self, slot: int, num_computed: int) -> None:
        """Let others share the slot's full blocks, as far as their tokens were known when it was admitted."""
        table, tokens, width = self.table, self._sequence(slot).token_bytes, self._block_bytes
        if tokens is None:
            return
        first = int(table.num_registered_blocks[slot])
        last = min(num_computed // self.limits.block_size, len(tokens) // width)
        if last <= first:
            return
        node = int(table.prefix_node[slot])
        for index, block in enumerate(table.block_table[slot, first:last].tolist(), start=first):
            node = self.blocks.register(block, node, tokens[index * width : (index + 1) * width])
        table.prefix_node[slot], table.num_registered_blocks[slot] = node, last

    # Launch

    def _launch(
        self,
        plan: DecodePlan,
        chunks: list[tuple[int, int, int]],
        grown: tuple[IntArray, IntArray, IntArray],
        admitted: list[tuple[int, Sequence]],
    ) -> ScheduledBatch:
        table = self.table
        prefill = np.array(chunks, dtype=np.int32).reshape(-1, 3)
        slots, starts, counts = prefill[:, 0], prefill[:, 1], prefill[:, 2]
        token_ids = [table.token_ids[slot, start : start + count] for slot, start, count in chunks]
        table.num_computed[plan.slots] += 1
        table.num_computed[slots] += counts
        for slot, start, count in chunks:
            self._register_blocks(slot, start + count)
        ending = slots[table.num_computed[slots] == table.prefill_end[slots]]
        sample_slots = np.concatenate([plan.slots, ending])
        positions = table.num_tokens[sample_slots]
        table.num_tokens[sample_slots] += 1
        block_slots, block_columns, blocks = self._block_updates(grown, admitted)
        released, self._released = self._released, []
        return ScheduledBatch(
            decode_plan=plan,
            prefill_slots=slots,
            prefill_starts=starts,
            prefill_counts=counts,
            prefill_token_ids=np.concatenate(token_ids) if token_ids else _NO_INTS,
            sample_slots=sample_slots,
            sample_seq_ids=table.seq_id[sample_slots],
            sample_positions=positions,
            block_slots=block_slots,
            block_columns=block_columns,
            blocks=blocks,
            released=released,
            admitted=admitted,
            prompt_logprob_chunks=self._prompt_logprob_chunks(slots),
            adapter_slots=self._adapter_slots(plan.slots, slots, counts),
            adapter_loads=self.adapters.take_loads(),
        )

    def _adapter_slots(self, decode_slots: IntArray, prefill_slots: IntArray, counts: IntArray) -> IntArray:
        if not self.adapters.in_use:
            return _NO_INTS
        adapter = self.table.adapter
        return np.concatenate([adapter[decode_slots], np.repeat(adapter[prefill_slots], counts)])

    def _prompt_logprob_chunks(self, slots: IntArray) -> list[tuple[int, Sequence]]:
        sequences = (self._sequence(slot) for slot in slots.tolist())
        return [(chunk, sequence) for chunk, sequence in enumerate(sequences) if sequence.lacks_prompt_logprobs]

    def _block_updates(
        self, grown: tuple[IntArray, IntArray, IntArray], admitted: list[tuple[int, Sequence]]
    ) -> tuple[IntArray, IntArray, IntArray]:
        held = [(slot, self.table.blocks(slot)) for slot, _ in admitted]
        return (
            np.concatenate([grown[0], *(np.full(len(blocks), slot, dtype=np.int32) for slot, blocks in held)]),
            np.concatenate([grown[1], *(np.arange(len(blocks), dtype=np.int32) for _, blocks in held)]),
            np.concatenate([grown[2], *(blocks for _, blocks in held)]),
        )

    # Ends

    def _finish(self, slot: int, reason: FinishReason, stop_reason: int | str | None) -> FinishedSequence:
        outputs = self.table.output_token_ids(slot)
        sequence = self._release(slot)
        if reason in ("stop", "length") and sequence.may_stop:
            self.lengths.observe(len(outputs), sequence.max_tokens - sequence.num_prompt)
        return FinishedSequence(sequence, outputs, reason, stop_reason)

    def _release(self, slot: int) -> Sequence:
        self.blocks.free(self.table.blocks(slot).copy())
        sequence = self.table.vacate(slot)
        self.adapters.release(sequence.request.lora_request)
        self._released.append(slot)
        self._num_penalty_seqs -= _uses_penalties(sequence)
        self._num_released += 1
        return sequence

    def _advance_guides(self, slot: int, token: int) -> FinishReason | None:
        """Let the slot's guides take in a token; returns how that ended the sequence, if it did."""
        sequence = self._sequence(slot)
        for guide in sequence.guides:
            guide.advance(token)
            if guide.error is not None:
                sequence.error = guide.error
                return "error"
            if guide.ended:
                return "stop"
        return None

    def _stop_token(self, slot: int, token: int) -> int | None:
        """The token as a stop reason; None where it is the model's own end of sequence."""
        return token if token in self._sequence(slot).request.sampling_params.stop_token_ids else None

    def _stop_string(self, slot: int) -> str | None:
        watch = self._sequence(slot).stop_watch
        return watch.advance(self.table.output_token_ids(slot)) if watch else None

    def _latest_admitted(self) -> int:
        slots = self.table.running()
        return int(slots[np.argmax(self.table.admission[slots])])

    def _preempt(self, slot: int) -> None:
        """Send a sequence back to wait; what it has computed stays cached until its blocks are needed."""
        assert self.table.num_running > 1, "a lone sequence always fits"
        known = self.table.token_ids[slot, : self.table.num_known[slot]].copy()
        sequence = self._sequence(slot)
        sequence.token_ids = known
        if self.limits.enable_prefix_caching:
            sequence.token_bytes = known.tobytes()
            self._register_blocks(slot, int(self.table.num_computed[slot]))
        self._release(slot)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.num_waiting += 1
        self.waiting.push_preempted(sequence)
        # What was just sent away would otherwise come straight back and be computed again for nothing.
        self._admission_is_due, self._num_released = False, 0

    def _sequence(self, slot: int) -> Sequence:
        sequence = self.table.sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence


def _uses_penalties(sequence: Sequence) -> bool:
    params = sequence.request.sampling_params
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
