"""Which prompts a beam search runs: the waiting, their admission, and what the running ones hold.

Owns the slots, KV blocks and adapters of groups, and the prefixes of prompts that they share. Knows no steps and no
log-probabilities.

A group is admitted with all the slots and blocks that it can come to need, so none is preempted and none waits for
another's end. Only one that could need more blocks than there are runs alone, and ends with an error if it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from raydata_llm.engine.beam_group import BeamGroup, OutOfBlocksError, most_blocks, table_row
from raydata_llm.engine.beam_params import BeamRequest, BeamSearchParams
from raydata_llm.engine.beam_rules import Numbers
from raydata_llm.engine.beam_tree import BeamTree
from raydata_llm.engine.block_manager import BlockArray
from raydata_llm.engine.grammar import GrammarGuide
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import MOST_LOGPROB_TOKEN_IDS, SamplingParams
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.sequence import Sequence
from raydata_llm.engine.structured_outputs import StructuredOutputsParams

_NO_INTS = np.zeros(0, dtype=np.int32)
GuideMaker = Callable[[StructuredOutputsParams, int], Callable[[], GrammarGuide]]
# Of a group in a step: the first prompt token to compute, and how many.
Chunk = tuple[BeamGroup, int, int]


class BeamQueue:
    """See the module's docstring.

    Args:
        scheduler: Of an engine without unfinished requests; its blocks, adapters and slots are the queue's meanwhile.
        end_token_ids: The model's.
        guide_maker: Makes what makes guides of a grammar, for so many outputs.
    """

    def __init__(self, scheduler: Scheduler, end_token_ids: tuple[int, ...], guide_maker: GuideMaker) -> None:
        self.groups: list[BeamGroup] = []
        self._scheduler, self._end_token_ids, self._guide_maker = scheduler, end_token_ids, guide_maker
        self._limits, self._blocks, self._adapters = scheduler.limits, scheduler.blocks, scheduler.intake.adapters
        self._waiting: deque[BeamRequest] = deque()
        self._free_slots = list(range(self._limits.num_slots - 1, -1, -1))
        self._admitted: list[tuple[int, Sequence]] = []
        self._num_sequences = 0

    def add(self, request: BeamRequest) -> None:
        """Let a request wait that the engine has checked."""
        assert request.params.beam_width <= self._limits.num_slots, "it would wait for ever"
        self._waiting.append(request)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self.groups

    def grow(self) -> list[tuple[BeamGroup, OutOfBlocksError]]:
        """Give decoding groups the blocks of their next tokens; returns those that have found none."""
        failed = []
        for group in self.groups:
            try:
                if not group.is_in_prefill:
                    group.grow(self._blocks, self._limits.block_size)
            except OutOfBlocksError as error:
                failed.append((group, error))
        return failed

    def fork(self, group: BeamGroup, parents: Numbers) -> None:
        """Let a group's new beams go on from their parents.

        Raises:
            OutOfBlocksError: as `BeamGroup.fork`.
        """
        group.fork(parents, self._blocks, self._limits.block_size)

    def take_admitted(self) -> list[tuple[int, Sequence]]:
        """The slots given out since the last step, with what their rows are sampled by."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def take_chunks(self, budget: int) -> list[Chunk]:
        """What is computed of prompts in the next step, `budget` tokens at most; admits groups."""
        chunks = []
        for group in self.groups:
            if group.is_in_prefill and budget > 0:
                chunks.append(self._chunk(group, budget))
                budget -= chunks[-1][2]
        while budget > 0 and self._waiting and self._has_room(self._waiting[0]):
            chunks.append(self._chunk(self._admit(self._waiting.popleft()), budget))
            budget -= chunks[-1][2]
        return chunks

    def release(self, group: BeamGroup) -> None:
        """Take back all that a group holds."""
        group.release(self._blocks)
        self.groups.remove(group)
        self._adapters.release(group.request.lora_request)
        self._free_slots += reversed(group.slots)
        self._scheduler.note_released(group.slots)

    def clear(self) -> None:
        """Drop everything."""
        self._waiting.clear()
        for group in list(self.groups):
            self.release(group)
        self._admitted = []

    def forget(self) -> None:
        """Drop everything, and give nothing back: slots and blocks are made anew."""
        self._waiting.clear()
        self.groups, self._admitted = [], []

    def check_integrity(self) -> None:
        """Assert that blocks and slots are held by groups or free (for tests)."""
        self._blocks.check_integrity([held for group in self.groups for held in group.blocks_of.values()])
        slots = [*self._free_slots, *(slot for group in self.groups for slot in group.slots)]
        assert sorted(slots) == list(range(self._limits.num_slots))
        assert all(len(set(group.beam_slots)) == len(group.beam_slots) for group in self.groups)

    def _chunk(self, group: BeamGroup, budget: int) -> Chunk:
        count = min(group.num_prompt - group.num_computed, budget)
        self._register(group, group.num_computed + count)
        return group, group.num_computed, count

    def _has_room(self, request: BeamRequest) -> bool:
        if len(self._free_slots) < request.params.beam_width or not self._adapters.has_room(request.lora_request):
            return False
        most = self._most_blocks(request)
        return not self.groups or most + sum(group.most_blocks for group in self.groups) <= self._blocks.num_usable

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
            guides=[] if params.form is None else [self._guide_maker(params.form, params.beam_width)()],
            tables=[table_row(slots[0], blocks)],
        )
        self._admitted += zip(slots, group.sequences, strict=True)
        self.groups.append(group)
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


def scoring_params(params: BeamSearchParams, num_candidates: int) -> SamplingParams:
    """What a beam's rows ask of the sampler: their likeliest tokens, or those that are allowed."""
    allowed = params.allowed_token_ids
    if params.form is not None:
        # Which of them may follow is each beam's own matter.
        return SamplingParams(temperature=0.0, logprobs=-1)
    if allowed is None:
        return SamplingParams(temperature=0.0, logprobs=num_candidates)
    if len(allowed) <= MOST_LOGPROB_TOKEN_IDS:
        return SamplingParams(temperature=0.0, logprob_token_ids=list(dict.fromkeys(allowed)))
    return SamplingParams(temperature=0.0, logprobs=-1)
