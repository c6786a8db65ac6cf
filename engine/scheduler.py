"""Decides, step by step, which tokens of which sequences are computed.

Owns the slots and their blocks, and how a sequence ends; the intake says which waiting ones get a slot. Knows no
tensors and no device: it is pure host code over NumPy arrays, tested without a model.

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

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.admission import forecast
from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.block_manager import BlockManager
from raydata_llm.engine.decode_plan import DecodePlan, plan_decode
from raydata_llm.engine.intake import Chunk, Intake
from raydata_llm.engine.length_model import LengthModel
from raydata_llm.engine.prompt_embeds import embedded_tokens
from raydata_llm.engine.request import FinishReason
from raydata_llm.engine.row_target import RowTarget
from raydata_llm.engine.scheduler_limits import SchedulerLimits
from raydata_llm.engine.sequence import FinishedSequence, IntArray, Sequence, SequenceTable

_NO_INTS = np.zeros(0, dtype=np.int32)


class Scheduler:
    """See the module's docstring.

    Args:
        limits: Budgets.
        blocks: The block pool; must hold at least one sequence of `max_model_len`.
        row_target: How many rows to run where memory holds some of them.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, row_target: RowTarget | None = None) -> None:
        self.limits = limits
        self.blocks = blocks
        self.table = SequenceTable(
            limits.num_slots, limits.max_model_len, limits.block_size, max_running=limits.max_num_seqs
        )
        self.lengths = LengthModel()
        self._row_target = row_target or RowTarget({})
        self.intake = Intake(limits, self.table, blocks, self.lengths, self._row_target)
        self.num_preemptions = 0
        self._released: list[int] = []
        self._lane = 0
        self._num_plans = limits.num_lanes
        self._decoding = [np.zeros(limits.num_slots, dtype=bool) for _ in range(limits.num_lanes)]
        self._plans = [self._plan_of(_NO_INTS, version=lane) for lane in range(limits.num_lanes)]

    def reset(self) -> None:
        """Forget every sequence and every cached prefix; the device is told that all slots are given up.

        For a step that ended midway with an exception: nothing that it may have left half done is kept.
        """
        limits = self.limits
        self.blocks = BlockManager(self.blocks.num_blocks)
        self.table = SequenceTable(
            limits.num_slots, limits.max_model_len, limits.block_size, max_running=limits.max_num_seqs
        )
        self.intake = Intake(limits, self.table, self.blocks, self.lengths, self._row_target)
        self._released = list(range(limits.num_slots))
        # Plans' numbers go on: the runner knows a plan by its number.
        for lane in range(limits.num_lanes):
            self._decoding[lane] = np.zeros(limits.num_slots, dtype=bool)
            self._plans[lane] = self._plan_of(_NO_INTS, version=self._num_plans + lane)
        self._num_plans += limits.num_lanes

    def add(self, sequence: Sequence) -> None:
        """Take a new sequence, whose tokens fit `max_model_len`."""
        self.intake.push(sequence)

    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return self.intake.num_waiting > 0 or self.table.num_running > 0

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
        chunks, budget = self.intake.continue_prefills(self._lane, budget)
        admitted: list[tuple[int, Sequence]] = []
        if self.intake.is_due(len(plan.slots)):
            anything_scheduled = bool(len(plan.slots) or chunks)
            admitted = self.intake.admit(self._lane, budget, chunks, anything_scheduled=anything_scheduled)
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
        stopped = table.is_stop(slots, tokens) & (known > table.min_tokens[slots])
        ended = stopped | (known >= table.max_tokens[slots])
        finished = []
        guided = np.flatnonzero(~stopped & table.guided[slots])
        self._advance_guides(slots[guided], tokens[guided])
        looked_at = ended | table.watched[slots]
        looked_at[guided] |= table.grammars.advance(slots[guided], tokens[guided])
        self._follow_thinking(slots[guided], tokens[guided])
        for row in np.flatnonzero(looked_at).tolist():
            slot = int(slots[row])
            sequence = self._sequence(slot)
            text_end = None if stopped[row] else self._stop_string(sequence, slot)
            grammar = sequence.grammar
            if grammar is not None and grammar.error is not None:
                sequence.error = grammar.error
            if sequence.error is not None:
                finished.append(self._finish(slot, "error", None))
            elif text_end is not None:
                finished.append(self._finish(slot, "stop", text_end))
            elif stopped[row] or (grammar is not None and grammar.ended):
                finished.append(self._finish(slot, "stop", self._stop_token(slot, int(tokens[row]))))
            elif ended[row]:
                finished.append(self._finish(slot, "length", None))
        return finished

    def abort(self, request_ids: set[str]) -> list[FinishedSequence]:
        """End all sequences of these requests now, with what was read of them."""
        finished = []
        for sequence in self.intake.abort(request_ids):
            outputs = sequence.token_ids[sequence.num_prompt :].tolist()
            finished.append(FinishedSequence(sequence, outputs, "abort", None))
        for slot in self.table.running().tolist():
            if self._sequence(slot).request.request_id in request_ids:
                finished.append(self._finish(slot, "abort", None))
        return finished

    def take_released(self) -> list[int]:
        """Slots given up that no step has told the device of; whoever takes them tells it."""
        released, self._released = self._released, []
        return released

    def note_released(self, slots: list[int]) -> None:
        """Have the next step tell the device that others than the scheduler's sequences have left these slots."""
        self._released += slots

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
        self.intake.check_integrity()
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
        is_full: npt.NDArray[np.bool_] = self.table.num_computed[slots] >= (
            self.table.num_blocks[slots] * self.limits.block_size
        )
        return is_full

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

    # Launch

    def _launch(
        self,
        plan: DecodePlan,
        chunks: list[Chunk],
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
            self.intake.register_blocks(slot, start + count)
        ending = slots[table.num_computed[slots] == table.prefill_end[slots]]
        sample_slots = np.concatenate([plan.slots, ending])
        positions = table.num_tokens[sample_slots]
        table.num_tokens[sample_slots] += 1
        block_slots, block_columns, blocks = self._block_updates(grown, admitted)
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
            released=self.take_released(),
            admitted=admitted,
            prompt_logprob_chunks=self._prompt_logprob_chunks(slots),
            adapter_slots=self._adapter_slots(plan.slots, slots, counts),
            adapter_loads=self.intake.adapters.take_loads(),
            embedded=embedded_tokens(
                (self._sequence(slot).prompt_embeds, start, count) for slot, start, count in chunks
            ),
        )

    def _adapter_slots(self, decode_slots: IntArray, prefill_slots: IntArray, counts: IntArray) -> IntArray:
        if not self.intake.adapters.in_use:
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
        self.intake.release(sequence)
        self._released.append(slot)
        return sequence

    def _advance_guides(self, slots: IntArray, tokens: IntArray) -> None:
        """Let what guides these slots, but for grammars, take in a token each."""
        for row in np.flatnonzero(self.table.guided_singly[slots]).tolist():
            for guide in self._sequence(int(slots[row])).guides:
                guide.advance(int(tokens[row]))

    def _follow_thinking(self, slots: IntArray, tokens: IntArray) -> None:
        """Begin the grammars of these slots whose thinking ends with a token."""
        for row in np.flatnonzero(self.table.thinks[slots]).tolist():
            thinking = self._sequence(int(slots[row])).thinking
            assert thinking is not None, "a slot thinks without markers"
            thinking.advance(int(tokens[row]))
            if thinking.is_over:
                self.table.begin_grammar(int(slots[row]))

    def _stop_token(self, slot: int, token: int) -> int | None:
        """The token as a stop reason; None where it is the model's own end of sequence."""
        return token if token in self._sequence(slot).request.sampling_params.stop_token_ids else None

    def _stop_string(self, sequence: Sequence, slot: int) -> str | None:
        if sequence.stop_watch is None:
            return None
        try:
            return sequence.stop_watch.advance(self.table.outputs(slot))
        except Exception as error:  # a tokenizer may not be able to decode what a model writes: its row's fault alone
            sequence.error = f"{type(error).__name__}: {error}"
            return None

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
            sequence.token_bytes = sequence.cache_bytes(self.limits.block_size)
            self.intake.register_blocks(slot, int(self.table.num_computed[slot]))
        self._release(slot)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.intake.push_preempted(sequence)

    def _sequence(self, slot: int) -> Sequence:
        return self.table.sequence(slot)
