"""One prompt's beams in KV memory: which slot each has, and which blocks.

Owns sharing: beams that come from one parent share its full blocks, and each has a last, partial block of its own.
Knows no log-probabilities and no device: what is to be copied and set there is kept as arrays until a step takes it.

    parent    [p p p p | p p . .]              the last block is partial
    children  [p p p p | p p . .]              the first takes the parent's blocks and slot
              [  the same   | c c . .]         others share what is full and get a copy of what is not
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.beam_params import BeamRequest
from raydata_llm.engine.beam_rules import Numbers
from raydata_llm.engine.beam_tree import BeamTree
from raydata_llm.engine.block_manager import BlockArray, BlockManager
from raydata_llm.engine.grammar import GrammarGuide
from raydata_llm.engine.prefix_cache import ROOT
from raydata_llm.engine.sequence import IntArray, Sequence

# Slots, columns and blocks of block table entries.
TableEntries = tuple[IntArray, IntArray, IntArray]


class OutOfBlocksError(ValueError):
    """A group that runs alone needs more KV blocks than there are."""


@dataclass(eq=False)
class BeamGroup:
    """See the module's docstring.

    Args:
        request: Whose it is.
        tree: What its beams are.
        slots: [beam_width] its slots, all through the search.
        sequences: What each slot's rows are sampled by.
        blocks_of: Of each beam's slot, its blocks in order.
        beam_slots: The slots of the beams, in the tree's order.
        num_computed: Tokens of each beam whose KV is written.
        most_blocks: Blocks that it can come to hold.
        node, num_registered: The prefix cache's node of the prompt, as far as its blocks are known to others.
        adapter: The slot of its adapter.
        last_tokens: Of each beam the token that it computes next.
        guides: Of each beam where it stands in its grammar; none without one.
        tables, copies: What the device is yet to be told: block table entries, and blocks to copy from and to.
    """

    request: BeamRequest
    tree: BeamTree
    slots: list[int]
    sequences: list[Sequence]
    blocks_of: dict[int, BlockArray]
    beam_slots: list[int]
    num_computed: int
    most_blocks: int
    node: int = ROOT
    num_registered: int = 0
    adapter: int = -1
    last_tokens: Numbers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    guides: list[GrammarGuide] = field(default_factory=list)
    tables: list[TableEntries] = field(default_factory=list)
    copies: list[tuple[BlockArray, BlockArray]] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def is_in_prefill(self) -> bool:
        """Whether prompt tokens are left to be computed."""
        return self.num_computed < self.num_prompt

    def fork(self, parents: Numbers, blocks: BlockManager, block_size: int) -> None:
        """Let each new beam go on from its parent.

        Raises:
            OutOfBlocksError: if blocks for the copies are lacking; `release` still gives back all.
        """
        num_full = self.num_computed // block_size
        old_slots, old_blocks = self.beam_slots, self.blocks_of
        self.beam_slots, moved = self._place(parents)
        stayed = set(self.beam_slots) - {slot for slot, _ in moved}
        self.blocks_of = {slot: held for slot, held in old_blocks.items() if slot in stayed}
        shared = [old_blocks[old_slots[parent]][:num_full] for _, parent in moved]
        for held in shared:
            blocks.share(held)
        # After the sharing: a beam's blocks live on in those of its kin.
        for slot in old_blocks.keys() - stayed:
            blocks.free(old_blocks[slot])
        self.blocks_of |= {slot: held for (slot, _), held in zip(moved, shared, strict=True)}
        if moved and self.num_computed % block_size:
            targets = self._allocate(len(moved), blocks)
            sources = np.array([old_blocks[old_slots[parent]][num_full] for _, parent in moved], dtype=np.int32)
            for (slot, _), copy in zip(moved, targets, strict=True):
                self.blocks_of[slot] = np.append(self.blocks_of[slot], copy)
            self.copies.append((sources, targets))
        self.tables += [table_row(slot, self.blocks_of[slot]) for slot, _ in moved]

    def grow(self, blocks: BlockManager, block_size: int) -> None:
        """Give each beam a block if its next token starts one.

        Raises:
            OutOfBlocksError: if they are lacking.
        """
        column = self.num_computed // block_size
        slots = np.array(self.beam_slots, dtype=np.int32)
        if len(self.blocks_of[self.beam_slots[0]]) > column:
            return
        fresh = self._allocate(len(slots), blocks)
        for slot, block in zip(self.beam_slots, fresh, strict=True):
            self.blocks_of[slot] = np.append(self.blocks_of[slot], block)
        self.tables.append((slots, np.full(len(slots), column, dtype=np.int32), fresh))

    def allowed(self, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        """Which tokens may follow each beam, [beams, vocabulary]; None where all may."""
        if not self.guides:
            return None
        words = np.zeros((len(self.guides), -(-vocab_size // 32)), dtype=np.int32)
        for row, guide in enumerate(self.guides):
            guide.fill(words, row)
        return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size].astype(bool)

    def guide(self, parents: Numbers) -> None:
        """Let each new beam, with its token in `last_tokens`, stand where its parent's token leads."""
        if self.guides:
            self.guides = [self.guides[parent].fork() for parent in parents.tolist()]
            for guide, token_id in zip(self.guides, self.last_tokens.tolist(), strict=True):
                guide.advance(token_id)

    def take_tables(self) -> list[TableEntries]:
        """The block table entries since the last step."""
        tables, self.tables = self.tables, []
        return tables

    def take_copies(self) -> list[tuple[BlockArray, BlockArray]]:
        """The blocks to copy since the last step."""
        copies, self.copies = self.copies, []
        return copies

    def release(self, blocks: BlockManager) -> None:
        """Give back all blocks."""
        for held in self.blocks_of.values():
            blocks.free(held)
        self.blocks_of = {}

    def _place(self, parents: Numbers) -> tuple[list[int], list[tuple[int, int]]]:
        """Slots of the new beams: a parent's first child stays; returns also (slot, parent) of those that do not."""
        staying: dict[int, int] = {}
        for beam, parent in enumerate(parents.tolist()):
            staying.setdefault(parent, beam)
        kept = {self.beam_slots[parent] for parent in staying}
        free = [slot for slot in self.slots if slot not in kept]
        placed, moved = [], []
        for beam, parent in enumerate(parents.tolist()):
            if staying[parent] == beam:
                placed.append(self.beam_slots[parent])
            else:
                placed.append(free.pop())
                moved.append((placed[-1], parent))
        return placed, moved

    def _allocate(self, count: int, blocks: BlockManager) -> BlockArray:
        if count > blocks.num_available:
            params = self.request.params
            raise OutOfBlocksError(
                f"beam_width={params.beam_width} over a prompt of {self.num_prompt} tokens and "
                f"{self.tree.num_outputs} output tokens takes more than the {blocks.num_usable} KV blocks that there "
                "are: lower beam_width or max_tokens, or raise gpu_memory_utilization or num_gpu_blocks_override"
            )
        return blocks.allocate(count)


def most_blocks(num_prompt: int, max_outputs: int, width: int, block_size: int) -> int:
    """Blocks that a group holds at most: the prompt's full ones once, all others once a beam."""
    shared = num_prompt // block_size
    # The last token of all is not computed.
    return shared + width * (-(-(num_prompt + max_outputs - 1) // block_size) - shared)


def table_row(slot: int, blocks: BlockArray) -> TableEntries:
    """The entries of a whole row of the block table."""
    return np.full(len(blocks), slot, dtype=np.int32), np.arange(len(blocks), dtype=np.int32), blocks
