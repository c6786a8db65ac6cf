"""The engine's live state of its generations: one `Sequence` each, and the slot arrays of those that run.

Owns no decisions: the scheduler moves sequences between waiting, running (in a slot) and finished.
Per-token state is in NumPy arrays over slots, never in per-sequence objects, so that a step costs the host a few
vector operations whatever the batch.

A slot's counts, in tokens:

    |<------- num_prompt ------->|<--- outputs read --->|<- being sampled ->|
    0                                            num_known          num_tokens        max_tokens
                                     num_computed: KV written, or being written, by launched steps
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.block_manager import TRASH_BLOCK, BlockArray
from raydata_llm.engine.grammar_slots import GrammarSlots
from raydata_llm.engine.prompt_embeds import Embeds, block_keys
from raydata_llm.engine.request import FinishReason, Logprob, Request, TokenArray

if TYPE_CHECKING:
    from raydata_llm.engine.grammar import GrammarGuide
    from raydata_llm.engine.guides import Guide
    from raydata_llm.engine.logits_processor import RequestProcessor
    from raydata_llm.engine.output_watch import OutputWatch
    from raydata_llm.engine.position_logprobs import PositionLogprobs
    from raydata_llm.engine.prompt_scores import PromptScores
    from raydata_llm.engine.thinking import ThinkingEnd

IntArray = npt.NDArray[np.int32]
NO_SEQUENCE = -1
_STOP_PADDING = -1


@dataclass(eq=False)
class Sequence:
    """One generation of a request.

    Args:
        seq_id: Never used twice by an engine.
        index: Which of the request's n outputs.
        token_ids: Prompt, and after a preemption the outputs so far; while running the slot arrays hold the rest.
        num_prompt: Prompt tokens after truncation.
        max_tokens: Prompt plus output tokens at which it ends by length.
        stop_token_ids: All token ids that end it.
        num_embedded: Positions of the prompt, from its start, that have an embedding and no token id.
        prompt_embeds: These, after truncation; of a rank they come with the steps that compute them.
        token_bytes: `token_ids` as the prefix cache compares them, made at the first admission attempt.
        grammar: Where it stands in the grammar that its output must follow.
        thinking: What its output writes before it follows the grammar; None where it follows from the start.
        guides: What else says which tokens may follow its outputs.
        processors: Users' own functions of its logits.
        error: Why it cannot go on, as `Type: message`.
        prompt_scores: None unless it is asked for the log-probabilities of named tokens at its prompt's positions.
        logprobs, prompt_logprobs: None unless it is asked for them; else those of the positions that are known.
    """

    seq_id: int
    request: Request
    index: int
    token_ids: TokenArray
    num_prompt: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    num_embedded: int = 0
    prompt_embeds: Embeds | None = None
    stop_watch: OutputWatch | None = None
    token_bytes: bytes | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    logprobs: PositionLogprobs[dict[int, Logprob]] | None = None
    prompt_logprobs: PositionLogprobs[dict[int, Logprob] | None] | None = None
    prompt_scores: PromptScores | None = None
    grammar: GrammarGuide | None = None
    thinking: ThinkingEnd | None = None
    guides: list[Guide] = field(default_factory=list)
    processors: list[RequestProcessor] = field(default_factory=list)
    error: str | None = None
    aborted: bool = False

    @property
    def prompt_token_ids(self) -> TokenArray:
        """The prompt's tokens; none of a prompt of embeddings."""
        return self.token_ids[self.num_embedded : self.num_prompt]

    def cache_bytes(self, block_size: int) -> bytes:
        """What is known of it as the prefix cache compares it."""
        if self.prompt_embeds is None:
            return self.token_ids.tobytes()
        return block_keys(self.prompt_embeds, self.token_ids[self.num_prompt :], block_size)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether its prompt is to be computed for its log-probabilities, from `first_asked` on."""
        if self.prompt_scores is not None and not self.prompt_scores.is_complete:
            return True
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    @property
    def first_asked(self) -> int:
        """The first position of its prompt that it lacks something of, if it does."""
        if self.prompt_scores is None or self.prompt_logprobs is not None:
            return 0
        return self.prompt_scores.start

    @property
    def is_guided(self) -> bool:
        """Whether the host settles what each of its draws may be."""
        return bool(self.grammar or self.guides or self.processors)

    @property
    def thinks(self) -> bool:
        """Whether its grammar waits for the end of its thinking."""
        return self.grammar is not None and self.thinking is not None and not self.thinking.is_over

    @property
    def may_stop(self) -> bool:
        """Whether it can end before `max_tokens`."""
        return bool(self.stop_token_ids or self.stop_watch)


@dataclass(frozen=True)
class FinishedSequence:
    """A sequence that ended: its output tokens and why."""

    sequence: Sequence
    output_token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None


class SequenceTable:
    """Arrays over slots; row s describes the sequence that runs in slot s.

    Args:
        num_slots: Rows of the arrays.
        max_running: Sequences that run at once at most; None: as many as there are slots.
        max_model_len: Tokens of a sequence at most.
        block_size: Tokens of a KV block.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, *, max_running: int | None = None) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.num_slots = num_slots
        self._max_running = num_slots if max_running is None else max_running
        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * num_slots
        self.seq_id = np.full(num_slots, NO_SEQUENCE, dtype=np.int64)
        self.num_prompt = np.zeros(num_slots, dtype=np.int32)
        self.num_known = np.zeros(num_slots, dtype=np.int32)
        self.num_tokens = np.zeros(num_slots, dtype=np.int32)
        self.num_computed = np.zeros(num_slots, dtype=np.int32)
        # Tokens that were known when it was admitted: until they are computed the sequence is in prefill.
        self.prefill_end = np.zeros(num_slots, dtype=np.int32)
        self.max_tokens = np.zeros(num_slots, dtype=np.int32)
        self.min_tokens = np.zeros(num_slots, dtype=np.int32)
        self.admission = np.zeros(num_slots, dtype=np.int64)
        self.lane = np.zeros(num_slots, dtype=np.int32)
        # The slot of its adapter, if it has one.
        self.adapter = np.zeros(num_slots, dtype=np.int32)
        self.num_blocks = np.zeros(num_slots, dtype=np.int32)
        self.num_shared_blocks = np.zeros(num_slots, dtype=np.int32)
        # Blocks that others can share already, and the prefix cache's node of the last of them.
        self.num_registered_blocks = np.zeros(num_slots, dtype=np.int32)
        self.prefix_node = np.zeros(num_slots, dtype=np.int64)
        self.may_stop = np.zeros(num_slots, dtype=bool)
        self.watched = np.zeros(num_slots, dtype=bool)
        self.guided = np.zeros(num_slots, dtype=bool)
        # Guided by more than a grammar: looked at one by one.
        self.guided_singly = np.zeros(num_slots, dtype=bool)
        # Those whose grammar waits for the end of their thinking.
        self.thinks = np.zeros(num_slots, dtype=bool)
        self.grammars = GrammarSlots(num_slots)
        self.token_ids = _sparse_zeros(num_slots, max_model_len)
        self.block_table = np.full((num_slots, max_blocks), TRASH_BLOCK, dtype=np.int32)
        self.stop_ids = np.full((num_slots, 4), _STOP_PADDING, dtype=np.int32)
        self.num_stop_ids = np.zeros(num_slots, dtype=np.int32)
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        """Slots that sequences may yet take."""
        return self._max_running - self.num_running

    @property
    def num_running(self) -> int:
        """Slots that a sequence runs in."""
        return self.num_slots - len(self._free_slots)

    def running(self) -> IntArray:
        """The slots in use, ascending."""
        return np.flatnonzero(self.seq_id != NO_SEQUENCE).astype(np.int32)

    def sequence(self, slot: int) -> Sequence:
        """The slot's sequence; there is one."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def blocks(self, slot: int) -> BlockArray:
        """The blocks that the slot's sequence holds, in order."""
        return self.block_table[slot, : self.num_blocks[slot]]

    def num_running_in(self, lane: int) -> int:
        """Slots of a lane that a sequence runs in."""
        return int(((self.seq_id != NO_SEQUENCE) & (self.lane == lane)).sum())

    def occupy(
        self, sequence: Sequence, blocks: BlockArray, *, num_shared: int, node: int, admission: int, lane: int = 0
    ) -> int:
        """Put a sequence into a free slot.

        Args:
            blocks: For all its known tokens, the first `num_shared` cached ones, of the prefix cache's `node`.
        """
        slot = self._free_slots.pop()
        known = len(sequence.token_ids)
        self.sequences[slot] = sequence
        self.seq_id[slot] = sequence.seq_id
        self.num_prompt[slot] = sequence.num_prompt
        self.num_known[slot] = self.num_tokens[slot] = self.prefill_end[slot] = known
        self.num_computed[slot] = num_shared * self.block_size
        self.max_tokens[slot] = sequence.max_tokens
        # No more than it may have: in 32 bits their sum has an end.
        min_tokens = min(sequence.request.sampling_params.min_tokens, sequence.max_tokens - sequence.num_prompt)
        self.min_tokens[slot] = sequence.num_prompt + min_tokens
        self.admission[slot] = admission
        self.lane[slot] = lane
        self.num_blocks[slot] = len(blocks)
        self.num_shared_blocks[slot] = self.num_registered_blocks[slot] = num_shared
        self.prefix_node[slot] = node
        self.may_stop[slot] = sequence.may_stop
        self.watched[slot] = sequence.stop_watch is not None
        self.guided[slot] = sequence.is_guided
        self.guided_singly[slot] = bool(sequence.guides or sequence.processors)
        self.begin_grammar(slot)
        self.token_ids[slot, :known] = sequence.token_ids
        self.block_table[slot, : len(blocks)] = blocks
        self._set_stop_ids(slot, sequence.stop_token_ids)
        return slot

    def is_stop(self, slots: IntArray, tokens: IntArray) -> npt.NDArray[np.bool_]:
        """[n] whether each slot's token is one that ends it; a row with many is the others' burden while it runs."""
        width = int(self.num_stop_ids[slots].max(initial=0))
        found: npt.NDArray[np.bool_] = (tokens[:, None] == self.stop_ids[slots, :width]).any(axis=1)
        return found

    def begin_grammar(self, slot: int) -> None:
        """Have the slot's sequence follow its grammar, unless it still thinks."""
        sequence = self.sequence(slot)
        self.thinks[slot] = sequence.thinks
        self.grammars.occupy(slot, None if sequence.thinks else sequence.grammar)

    def vacate(self, slot: int) -> Sequence:
        """Empty a slot; launched steps that still name its sequence are told apart by `seq_id`."""
        sequence = self.sequence(slot)
        self.sequences[slot] = None
        self.grammars.occupy(slot, None)
        self.seq_id[slot] = NO_SEQUENCE
        self._free_slots.append(slot)
        return sequence

    def outputs(self, slot: int) -> IntArray:
        """The outputs read so far; a view, good until the slot changes hands."""
        return self.token_ids[slot, self.num_prompt[slot] : self.num_known[slot]]

    def output_token_ids(self, slot: int) -> list[int]:
        """The outputs read so far."""
        tokens: list[int] = self.outputs(slot).tolist()
        return tokens

    def _set_stop_ids(self, slot: int, stop_token_ids: tuple[int, ...]) -> None:
        width = self.stop_ids.shape[1]
        if len(stop_token_ids) > width:
            wider = np.full((self.num_slots, len(stop_token_ids)), _STOP_PADDING, dtype=np.int32)
            wider[:, :width] = self.stop_ids
            self.stop_ids = wider
        self.num_stop_ids[slot] = len(stop_token_ids)
        self.stop_ids[slot] = _STOP_PADDING
        self.stop_ids[slot, : len(stop_token_ids)] = stop_token_ids


def _sparse_zeros(num_rows: int, width: int) -> IntArray:
    """[num_rows, width] zeros that take memory where they are written, so that a long max_model_len costs nothing.

    Not np.zeros, which asks for huge pages: the first token of each row then clears 2 MiB, while the GPU waits.
    """
    memory = mmap.mmap(-1, num_rows * width * np.dtype(np.int32).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # Kernels built without huge pages answer that they know no such advice.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.int32).reshape(num_rows, width)
