"""The block pool under any order of operations."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raydata_llm.engine.block_manager import TRASH_BLOCK, BlockArray, BlockManager
from raydata_llm.engine.prefix_cache import ROOT

NUM_BLOCKS = 12


class BlockPool(RuleBasedStateMachine):
    """Sequences that allocate, share cached prefixes, register blocks and free, as the scheduler does."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS)
        self.held: list[BlockArray] = []
        self.content: dict[int, list[int]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def start(self, tokens: list[int]) -> None:
        data = bytes(tokens)
        cached, node = self.manager.match(data, 1, len(data))
        prefixes = [tokens[: end + 1] for end in range(len(tokens))]
        assert [self.content[block] for block in cached.tolist()] == prefixes[: len(cached)], "a wrong prefix"
        fresh = len(tokens) - len(cached)
        if fresh + self.manager.num_evictable(cached) > self.manager.num_available:
            return
        self.manager.share(cached)
        blocks = np.concatenate([cached, self.manager.allocate(fresh)])
        assert TRASH_BLOCK not in blocks
        for index, block in enumerate(blocks.tolist()):
            self.content[block] = prefixes[index]
            if index >= len(cached):
                node = self.manager.register(block, node, data[index : index + 1])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        if self.manager.num_available:
            grown = self.manager.allocate(1)
            self.content[int(grown[0])] = []
            self.held[index] = np.concatenate([self.held[index], grown])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.manager.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()

    @invariant()
    def nothing_leaks(self) -> None:
        self.manager.check_integrity(self.held)
        held = {block for blocks in self.held for block in blocks.tolist()}
        assert self.manager.num_held == len(held)
        assert self.manager.num_available == NUM_BLOCKS - 1 - len(held)


TestBlockPool = BlockPool.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_prefix_is_evicted_first() -> None:
    manager = BlockManager(5)
    old, young = manager.allocate(2), manager.allocate(2)
    for name, blocks in ((b"o", old), (b"y", young)):
        node = ROOT
        for block in blocks.tolist():
            node = manager.register(block, node, name)
    manager.free(old)
    manager.free(young)
    manager.allocate(1)
    assert manager.match(b"oo", 1, 2)[0].tolist() == [old[0]], "the deepest block of the oldest prefix goes first"
    assert manager.match(b"yy", 1, 2)[0].tolist() == young.tolist()


def test_what_stood_below_a_prefix_that_is_gone_is_not_found_below_another() -> None:
    """Two rows compute the same first block; the second's next block hangs below the first's."""
    manager = BlockManager(5)
    first, second = manager.allocate(1), manager.allocate(2)
    manager.register(int(first[0]), ROOT, b"a")
    node = manager.register(int(second[0]), ROOT, b"a")
    manager.register(int(second[1]), node, b"b")
    manager.free(first)
    taken = manager.allocate(2)
    manager.register(int(taken[1]), ROOT, b"a")
    assert first[0] in taken, "the cached block was evicted"
    assert manager.match(b"ab", 1, 2)[0].tolist() == [taken[1]]


def test_freeing_twice_is_caught() -> None:
    manager = BlockManager(4)
    blocks = manager.allocate(2)
    manager.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(blocks)


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=1 is not valid"):
        BlockManager(1)


def test_rows_that_start_a_block_together_get_neighbours_again_once_others_have_ended() -> None:
    manager = BlockManager(1 + 40 * 5)
    # Each of 40 rows starts a block in the same step as the others, five times.
    rounds = [manager.allocate(40) for _ in range(5)]
    assert all((np.diff(blocks) == 1).all() for blocks in rounds)
    for row in np.random.default_rng(0).permutation(40):
        manager.free(np.array([blocks[row] for blocks in rounds]))
    rounds = [manager.allocate(40) for _ in range(5)]
    assert all((np.diff(blocks) == 1).all() for blocks in rounds), rounds
