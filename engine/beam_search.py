"""Beam search: many prompts' beams in full batches, over the engine's worker and its KV blocks.

Owns the queue of groups, their slots, and a loop of its own: what a beam computes next depends on what all beams of its
group may say, so a step is launched when the one before has been read, not ahead of it. Every group's beams are in
every step, beside the chunks of prompts that come in; a step of beams alone is a decode step, with the CUDA graphs and
the shared prefixes of any other. It runs while the engine has nothing else to do.

A group is admitted with all the slots and blocks that it can come to need, so none is preempted and none waits for
another's end. Only one that could need more blocks than there are runs alone, and ends with an error if it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

import numpy as np

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.beam_group import BeamGroup, OutOfBlocksError, most_blocks, table_row
from raydata_llm.engine.beam_params import BeamRequest, BeamSearchOutput, BeamSearchParams
from raydata_llm.engine.beam_tree import BeamTree, TopTokens
from raydata_llm.engine.block_manager import BlockArray
from raydata_llm.engine.decode_plan import DecodePlan, plan_decode
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampler import Rows, SampledLogprobs
from raydata_llm.engine.sampling_params import MOST_LOGPROB_TOKEN_IDS, SamplingParams
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.sequence import IntArray, Sequence

_NO_INTS = np.zeros(0, dtype=np.int32)
_Chunk = tuple[BeamGroup, int, int]
# Launches a step and reads what its rows asked for.
RunStep = Callable[[ScheduledBatch], SampledLogprobs | None]


class BeamSearch:
    """See the module's docstring.

    Args:
        scheduler: Of an engine without unfinished requests; its blocks, adapters and slots are the search's meanwhile.
        end_token_ids: The model's.
        run: Runs a step.
    """

    def __init__(self, scheduler: Scheduler, end_token_ids: tuple[int, ...], run: RunStep) -> None:
        self._scheduler, self._run, self._end_token_ids = scheduler, run, end_token_ids
        self._limits, self._blocks, self._adapters = scheduler.limits, scheduler.blocks, scheduler.intake.adapters
        self._waiting: deque[BeamRequest] = deque()
        self._groups: list[BeamGroup] = []
        self._free_slots = list(range(self._limits.max_num_seqs - 1, -1, -1))
        self._admitted: list[tuple[int, Sequence]] = []
        self._num_sequences = 0
        self._plan = self._plan_of([], version=-2)

    def add(self, request: BeamRequest) -> None:
        """Queue a request that the engine has checked.

        Raises:
            ValueError: for more beams than the engine runs.
        """
        width = request.params.beam_width
        if width > self._limits.max_num_seqs:
            limit = f"max_num_seqs={self._limits.max_num_seqs}"
            raise ValueError(f"beam_width={width} is more than {limit}: lower it, or raise max_num_seqs")
        self._waiting.append(request)

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._groups)

    def step(self) -> list[tuple[str, BeamSearchOutput]]:
        """Run a step; returns the results of requests that ended, by request id."""
        ended = self._grow()
        decoding = [group for group in self._groups if not group.is_in_prefill]
        chunks = self._chunks(self._limits.max_num_batched_tokens - sum(len(one.beam_slots) for one in decoding))
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
        self._waiting.clear()
        for group in list(self._groups):
            self._release(group)
        self._admitted = []

    def check_integrity(self) -> None:
        """Assert that blocks and slots are held by groups or free (for tests)."""
        self._blocks.check_integrity([held for group in self._groups for held in group.blocks_of.values()])
        slots = [*self._free_slots, *(slot for group in self._groups for slot in group.slots)]
        assert sorted(slots) == list(range(self._limits.max_num_seqs))
        assert all(len(set(group.beam_slots)) == len(group.beam_slots) for group in self._groups)

    # Room

    def _grow(self) -> list[tuple[str, BeamSearchOutput]]:
        """Give decoding groups the blocks of their next tokens; returns the result of one that has found none."""
        failed = []
        for group in [one for one in self._groups if not one.is_in_prefill]:
            try:
                group.grow(self._blocks, self._limits.block_size)
            except OutOfBlocksError as error:
                failed.append(self._fail(group, error))
        return failed

    def _chunks(self, budget: int) -> list[_Chunk]:
        """What is computed of prompts in this step: (group, start, count); admits groups."""
        chunks = []
        for group in self._groups:
            if group.is_in_prefill and budget > 0:
                chunks.append(self._chunk(group, budget))
                budget -= chunks[-1][2]
        while budget > 0 and self._waiting and self._has_room(self._waiting[0]):
            chunks.append(self._chunk(self._admit(self._waiting.popleft()), budget))
            budget -= chunks[-1][2]
        return chunks

    def _chunk(self, group: BeamGroup, budget: int) -> _Chunk:
        count = min(group.num_prompt - group.num_computed, budget)
        self._register(group, group.num_computed + count)
        return group, group.num_computed, count

    def _has_room(self, request: BeamRequest) -> bool:
        if len(self._free_slots) < request.params.beam_width or not self._adapters.has_room(request.lora_request):
            return False
        most = self._most_blocks(request)
        return not self._groups or most + sum(group.most_blocks for group in self._groups) <= self._blocks.num_usable

    def _most_blocks(self, request: BeamRequest) -> int:
        num_prompt, width = len(request.prompt_token_ids), request.params.beam_width
        return most_blocks(num_prompt, self._max_outputs(request), width, self._limits.block_size)

    def _max_outputs(self, request: BeamRequest) -> int:
        return min(request.params.max_tokens, self._limits.max_model_len - len(request.prompt_token_ids))

    def _admit(self, request: BeamRequest) -> BeamGroup:
        params, num_prompt = request.params, len(request.prompt_token_ids)
        tree = BeamTree(params, num_prompt, self._max_outputs(request), self._end_token_ids)
        slots = [self._free_slots.pop() for _ in range(params.beam_width)]
        cached, node = self._cached(request)
        self._blocks.share(cached)
        fresh = self._blocks.allocate(-(-num_prompt // self._limits.block_size) - len(cached))
        blocks: BlockArray = np.concatenate([cached, fresh])
        group = BeamGroup(
            request=request,
            tree=tree,
            slots=slots,
            sequences=[self._sequence(request, tree) for _ in slots],
            blocks_of={slots[0]: blocks},
            beam_slots=[slots[0]],
            num_computed=len(cached) * self._limits.block_size,
            most_blocks=self._most_blocks(request),
            node=node,
            num_registered=len(cached),
            adapter=self._adapters.acquire(request.lora_request),
            tables=[table_row(slots[0], blocks)],
        )
        self._admitted += zip(slots, group.sequences, strict=True)
        self._groups.append(group)
        return group

    def _sequence(self, request: BeamRequest, tree: BeamTree) -> Sequence:
        """What a slot's rows are sampled by: no draw counts, the log-probabilities do."""
        self._num_sequences += 1
        params = scoring_params(request.params, tree.num_candidates)
        asked = Request(
            request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, sampling_params=params
        )
        return Sequence(
            # Not those of the engine's own sequences.
            seq_id=-1 - self._num_sequences,
            request=asked,
            index=0,
            token_ids=request.prompt_token_ids,
            num_prompt=len(request.prompt_token_ids),
            max_tokens=0,
            stop_token_ids=(),
        )

    def _release(self, group: BeamGroup) -> None:
        group.release(self._blocks)
        self._groups.remove(group)
        self._adapters.release(group.request.lora_request)
        self._free_slots += reversed(group.slots)
        self._scheduler.note_released(group.slots)

    # Prefix cache

    def _cached(self, request: BeamRequest) -> tuple[BlockArray, int]:
        root = self._adapters.root(request.lora_request)
        if not self._limits.enable_prefix_caching:
            return _NO_INTS, root
        size = self._limits.block_size
        limit = (len(request.prompt_token_ids) - 1) // size
        return self._blocks.match(request.prompt_token_ids.tobytes(), self._block_bytes, limit, root)

    @property
    def _block_bytes(self) -> int:
        return self._limits.block_size * _NO_INTS.itemsize

    def _register(self, group: BeamGroup, num_computed: int) -> None:
        """Let others share the prompt's full blocks: in this very step already, as in the scheduler."""
        last = num_computed // self._limits.block_size
        if not self._limits.enable_prefix_caching or last <= group.num_registered:
            return
        tokens, width = group.request.prompt_token_ids.tobytes(), self._block_bytes
        held = group.blocks_of[group.beam_slots[0]]
        for index in range(group.num_registered, last):
            edge = tokens[index * width : (index + 1) * width]
            group.node = self._blocks.register(int(held[index]), group.node, edge)
        group.num_registered = last

    # A step

    def _batch(self, decoding: list[BeamGroup], chunks: list[_Chunk]) -> ScheduledBatch:
        self._plan_decode(decoding)
        ending = [group.beam_slots[0] for group, start, count in chunks if start + count == group.num_prompt]
        sample_slots = np.concatenate([self._plan.slots, np.array(ending, dtype=np.int32)])
        prefill = np.array([(one.beam_slots[0], *rest) for one, *rest in chunks], dtype=np.int32).reshape(-1, 3)
        tokens = [one.request.prompt_token_ids[start : start + count] for one, start, count in chunks]
        tables = [one for group in self._groups for one in group.take_tables()]
        copies = [one for group in self._groups for one in group.take_copies()]
        admitted, self._admitted = self._admitted, []
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
            admitted=admitted,
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

    def _adapter_slots(self, decoding: list[BeamGroup], chunks: list[_Chunk]) -> IntArray:
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
        tops = top_tokens(logprobs, rows, group.request.params.allowed_token_ids, group.tree.num_candidates)
        chosen = group.tree.advance(tops)
        if chosen is None:
            return self._finish(group)
        parents, group.last_tokens = chosen
        try:
            group.fork(parents, self._blocks, self._limits.block_size)
        except OutOfBlocksError as error:
            return self._fail(group, error)
        return None

    def _finish(self, group: BeamGroup) -> tuple[str, BeamSearchOutput]:
        self._release(group)
        sequences = group.tree.sequences(group.request.prompt_token_ids.tolist())
        for sequence in sequences:
            sequence.lora_request = group.request.lora_request
        return group.request.request_id, BeamSearchOutput(sequences)

    def _fail(self, group: BeamGroup, error: OutOfBlocksError) -> tuple[str, BeamSearchOutput]:
        self._release(group)
        return group.request.request_id, BeamSearchOutput(error=f"ValueError: {error}")


def scoring_params(params: BeamSearchParams, num_candidates: int) -> SamplingParams:
    """What a beam's rows ask of the sampler: their likeliest tokens, or those that are allowed."""
    allowed = params.allowed_token_ids
    if allowed is None:
        return SamplingParams(temperature=0.0, logprobs=num_candidates)
    if len(allowed) <= MOST_LOGPROB_TOKEN_IDS:
        return SamplingParams(temperature=0.0, logprob_token_ids=list(dict.fromkeys(allowed)))
    return SamplingParams(temperature=0.0, logprobs=-1)


def top_tokens(
    logprobs: SampledLogprobs, rows: Rows, allowed: Collection[int] | None, num_candidates: int
) -> TopTokens:
    """The best candidates of some beams.

    Args:
        rows: [b] the beams' rows among the step's.
        allowed: The only token ids that may follow, or None.
    """
    values, wanted = logprobs.values, logprobs.wanted
    first = wanted[int(rows[0])]
    if first.token_ids:
        token_ids = np.broadcast_to(np.array(first.token_ids, dtype=np.int64), (len(rows), len(first.token_ids)))
        found = values.named.numpy()[rows, : len(first.token_ids)].astype(np.float64)
    else:
        token_ids = values.top_ids.numpy()[rows, : first.num_top].astype(np.int64)
        found = values.top_logprobs.numpy()[rows, : first.num_top].astype(np.float64)
    if allowed is None:
        return TopTokens(token_ids, found, ranked=True)
    found = np.where(np.isin(token_ids, np.array([*allowed])), found, -np.inf)
    best = np.argsort(-found, axis=1, kind="stable")[:, :num_candidates]
    return TopTokens(np.take_along_axis(token_ids, best, 1), np.take_along_axis(found, best, 1), ranked=False)


def _joined(arrays: list[IntArray]) -> IntArray:
    return np.concatenate([_NO_INTS, *arrays])
