"""Beam search: many prompts' beams in full batches, over the engine's worker and its KV blocks.

Owns a loop of its own: what a beam computes next depends on what all beams of its group may say, so a step is launched
when the one before has been read, not ahead of it. Every group's beams are in every step, beside the chunks of prompts
that come in; a step of beams alone is a decode step, with the CUDA graphs and the shared prefixes of any other. It runs
while the engine has nothing else to do. Which groups run, and in what memory, is `beam_queue.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.beam_group import BeamGroup, OutOfBlocksError
from raydata_llm.engine.beam_params import BeamRequest, BeamSearchOutput
from raydata_llm.engine.beam_queue import BeamQueue, Chunk, GuideMaker
from raydata_llm.engine.beam_tree import TopTokens
from raydata_llm.engine.decode_plan import DecodePlan, plan_decode
from raydata_llm.engine.sampler import Rows, SampledLogprobs
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.sequence import IntArray

_NO_INTS = np.zeros(0, dtype=np.int32)
# Launches a step and reads what its rows asked for.
RunStep = Callable[[ScheduledBatch], SampledLogprobs | None]


class BeamSearch:
    """See the module's docstring.

    Args:
        scheduler: Of an engine without unfinished requests; its blocks, adapters and slots are the search's meanwhile.
        end_token_ids: The model's.
        run: Runs a step.
        guide_maker: Makes what makes guides of a grammar.
    """

    def __init__(
        self, scheduler: Scheduler, end_token_ids: tuple[int, ...], run: RunStep, guide_maker: GuideMaker
    ) -> None:
        self._scheduler, self._run, self._limits = scheduler, run, scheduler.limits
        self._adapters = scheduler.intake.adapters
        self._queue = BeamQueue(scheduler, end_token_ids, guide_maker)
        self._is_open = True
        self._plan = self._plan_of([], version=-2)

    def add(self, request: BeamRequest) -> None:
        """Queue a request that the engine has checked.

        Raises:
            RuntimeError: once the search is closed.
        """
        self._check_open()
        self._queue.add(request)

    @property
    def is_open(self) -> bool:
        """Whether the engine is the search's."""
        return self._is_open

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return not self._queue.is_empty

    def step(self) -> list[tuple[str, BeamSearchOutput]]:
        """Run a step; returns the results of requests that ended, by request id.

        Whatever is raised, the search is closed then, and the engine takes new requests.
        """
        self._check_open()
        try:
            return self._step()
        except BaseException:
            # It may have ended anywhere: nothing that it left half done is kept.
            self._queue.forget()
            self._scheduler.reset()
            self._is_open = False
            raise

    def _step(self) -> list[tuple[str, BeamSearchOutput]]:
        ended = [self._fail(group, error) for group, error in self._queue.grow()]
        decoding = [group for group in self._queue.groups if not group.is_in_prefill]
        budget = self._limits.max_num_batched_tokens - sum(len(one.beam_slots) for one in decoding)
        chunks = self._queue.take_chunks(budget)
        if not decoding and not chunks:
            return ended
        batch = self._batch(decoding, chunks)
        logprobs = self._run(batch)
        for group, _, count in chunks:
            group.num_computed += count
        for group in decoding:
            group.num_computed += 1
        sampled = [*decoding, *(group for group, _, _ in chunks if not group.is_in_prefill)]
        if sampled:
            assert logprobs is not None, "every beam asks for log-probabilities"
            row_of = {slot: row for row, slot in enumerate(batch.sample_slots.tolist())}
            ended += [one for group in sampled if (one := self._advance(group, logprobs, row_of)) is not None]
        return ended

    def close(self) -> None:
        """Drop what is unfinished and give everything back to the engine."""
        self._queue.clear()
        self._is_open = False

    def check_integrity(self) -> None:
        """Assert the queue's invariants (for tests)."""
        self._queue.check_integrity()

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("this beam search was closed: begin another with Engine.beam_search()")

    # A step

    def _batch(self, decoding: list[BeamGroup], chunks: list[Chunk]) -> ScheduledBatch:
        self._plan_decode(decoding)
        ending = [group.beam_slots[0] for group, start, count in chunks if start + count == group.num_prompt]
        sample_slots = np.concatenate([self._plan.slots, np.array(ending, dtype=np.int32)])
        prefill = np.array([(one.beam_slots[0], *rest) for one, *rest in chunks], dtype=np.int32).reshape(-1, 3)
        tokens = [one.request.prompt_token_ids[start : start + count] for one, start, count in chunks]
        tables = [one for group in self._queue.groups for one in group.take_tables()]
        copies = [one for group in self._queue.groups for one in group.take_copies()]
        # Each of a group's beams has as many tokens.
        counts = [np.full(len(group.beam_slots), group.num_computed, dtype=np.int32) for group in decoding]
        return ScheduledBatch(
            decode_plan=self._plan,
            prefill_slots=prefill[:, 0],
            prefill_starts=prefill[:, 1],
            prefill_counts=prefill[:, 2],
            prefill_token_ids=_joined(tokens),
            sample_slots=sample_slots,
            sample_seq_ids=np.zeros(len(sample_slots), dtype=np.int64),
            sample_positions=np.zeros(len(sample_slots), dtype=np.int32),
            block_slots=_joined([slots for slots, _, _ in tables]),
            block_columns=_joined([columns for _, columns, _ in tables]),
            blocks=_joined([blocks for _, _, blocks in tables]),
            released=self._scheduler.take_released(),
            admitted=self._queue.take_admitted(),
            adapter_slots=self._adapter_slots(decoding, chunks),
            adapter_loads=self._adapters.take_loads(),
            copy_sources=_joined([sources for sources, _ in copies]),
            copy_targets=_joined([targets for _, targets in copies]),
            beam_slots=_joined([np.array(group.beam_slots, dtype=np.int32) for group in decoding]),
            beam_tokens=_joined([group.last_tokens.astype(np.int32) for group in decoding]),
            beam_counts=_joined(counts),
        )

    def _plan_decode(self, decoding: list[BeamGroup]) -> None:
        """A new plan if other slots decode than in the last step."""
        slots = [slot for group in decoding for slot in group.beam_slots]
        if {*slots} != {*self._plan.slots.tolist()}:
            # Below -1: plans of the engine's scheduler count up from 0.
            self._plan = self._plan_of(decoding, version=self._plan.version - 1)

    def _plan_of(self, decoding: list[BeamGroup], version: int) -> DecodePlan:
        """Beams share their prompts' full blocks to the end; what else they share for now is left out."""
        size = self._limits.block_size
        rows = [(slot, group) for group in decoding for slot in group.beam_slots]
        num_blocks = np.array([group.num_prompt // size for _, group in rows], dtype=np.int32)
        tables = np.zeros((len(rows), int(num_blocks.max(initial=0))), dtype=np.int32)
        for row, (slot, group) in enumerate(rows):
            tables[row, : num_blocks[row]] = group.blocks_of[slot][: num_blocks[row]]
        return plan_decode(
            version,
            np.array([slot for slot, _ in rows], dtype=np.int32),
            tables,
            num_blocks,
            np.array([group.num_computed for _, group in rows], dtype=np.int32),
            size,
            share_prefixes=self._limits.share_prefixes,
        )

    def _adapter_slots(self, decoding: list[BeamGroup], chunks: list[Chunk]) -> IntArray:
        if not self._adapters.in_use:
            return _NO_INTS
        adapter_of = {slot: group.adapter for group in decoding for slot in group.beam_slots}
        of_rows = np.array([adapter_of[slot] for slot in self._plan.slots.tolist()], dtype=np.int32)
        return np.concatenate([of_rows, *(np.full(count, one.adapter, dtype=np.int32) for one, _, count in chunks)])

    # Ends

    def _advance(
        self, group: BeamGroup, logprobs: SampledLogprobs, row_of: dict[int, int]
    ) -> tuple[str, BeamSearchOutput] | None:
        """Choose the group's next beams; returns its result if it has ended."""
        rows = np.array([row_of[slot] for slot in group.beam_slots])
        tops = top_tokens(
            logprobs,
            rows,
            group.request.params.allowed_token_ids,
            group.tree.num_candidates,
            group.allowed(logprobs.wanted[int(rows[0])].num_top),
        )
        chosen = group.tree.advance(tops)
        if chosen is None:
            return self._finish(group)
        parents, group.last_tokens = chosen
        group.guide(parents)
        try:
            self._queue.fork(group, parents)
        except OutOfBlocksError as error:
            return self._fail(group, error)
        return None

    def _finish(self, group: BeamGroup) -> tuple[str, BeamSearchOutput]:
        self._queue.release(group)
        sequences = group.tree.sequences(group.request.prompt_token_ids.tolist())
        for sequence in sequences:
            sequence.lora_request = group.request.lora_request
        return group.request.request_id, BeamSearchOutput(sequences)

    def _fail(self, group: BeamGroup, error: OutOfBlocksError) -> tuple[str, BeamSearchOutput]:
        self._queue.release(group)
        return group.request.request_id, BeamSearchOutput(error=f"ValueError: {error}")


def top_tokens(
    logprobs: SampledLogprobs,
    rows: Rows,
    allowed: Collection[int] | None,
    num_candidates: int,
    allowed_by_form: npt.NDArray[np.bool_] | None = None,
) -> TopTokens:
    """The best candidates of some beams.

    Args:
        rows: [b] the beams' rows among the step's.
        allowed: The only token ids that may follow, or None.
        allowed_by_form: [b, V] which tokens may follow each beam, or None; all log-probabilities were asked for then.
    """
    values, wanted = logprobs.values, logprobs.wanted
    first = wanted[int(rows[0])]
    if first.token_ids:
        token_ids = np.broadcast_to(np.array(first.token_ids, dtype=np.int64), (len(rows), len(first.token_ids)))
        found = values.named.numpy()[rows, : len(first.token_ids)].astype(np.float64)
    else:
        token_ids = values.top_ids.numpy()[rows, : first.num_top].astype(np.int64)
        found = values.top_logprobs.numpy()[rows, : first.num_top].astype(np.float64)
    if allowed is None and allowed_by_form is None:
        return TopTokens(token_ids, found, ranked=True)
    if allowed is not None:
        found = np.where(np.isin(token_ids, np.array([*allowed])), found, -np.inf)
    if allowed_by_form is not None:
        found = np.where(np.take_along_axis(allowed_by_form, token_ids, 1), found, -np.inf)
    best = np.argsort(-found, axis=1, kind="stable")[:, :num_candidates]
    return TopTokens(np.take_along_axis(token_ids, best, 1), np.take_along_axis(found, best, 1), ranked=False)


def _joined(arrays: list[IntArray]) -> IntArray:
    return np.concatenate([_NO_INTS, *arrays])
