"""The block pool under any order of operations."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raydata_llm.engine.block_manager import TRASH_BLOCK, BlockArray, BlockManager, block_digests

NUM_BLOCKS = 12


class BlockPool(RuleBasedStateMachine):
    """Sequences that allocate, share cached prefixes, register blocks and free, as the scheduler does."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS)
        self.held: list[BlockArray] = []
        self.content: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def start(self, tokens: list[int]) -> None:
        digests = block_digests(np.array(tokens, dtype=np.int32), 1)
        cached = self.manager.match(digests)
        assert [self.content[block] for block in cached] == digests[: len(cached)], "a block under a wrong prefix"
        fresh = len(tokens) - len(cached)
        if fresh + self.manager.num_evictable(cached) > self.manager.num_available:
            return
        self.manager.share(cached)
        blocks = np.concatenate([np.array(cached, dtype=np.int32), self.manager.allocate(fresh)])
        assert TRASH_BLOCK not in blocks
        for block, digest in zip(blocks.tolist(), digests, strict=True):
            self.content[block] = digest
            self.manager.register(block, digest)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        if self.manager.num_available:
            grown = self.manager.allocate(1)
            self.content[int(grown[0])] = b"unregistered"
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
    for name, blocks in (("old", old), ("young", young)):
        for index, block in enumerate(blocks.tolist()):
            manager.register(block, f"{name}{index}".encode())
    manager.free(old)
    manager.free(young)
    manager.allocate(1)
    assert manager.match([b"old0", b"old1"]) == [old[0]], "the deepest block of the oldest prefix goes first"
    assert manager.match([b"young0", b"young1"]) == young.tolist()


def test_freeing_twice_is_caught() -> None:
    manager = BlockManager(4)
    blocks = manager.allocate(2)
    manager.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(blocks)


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=1 is not valid"):
        BlockManager(1)


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30), st.integers(1, 5))
def test_digests_agree_exactly_on_the_common_full_blocks(left: list[int], right: list[int], size: int) -> None:
    digests = [block_digests(np.array(tokens, dtype=np.int32), size) for tokens in (left, right)]
    assert [len(d) for d in digests] == [len(left) // size, len(right) // size]
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    shared = sum(a == b for a, b in zip(*digests, strict=False))
    assert shared == common // size


def test_salt_sets_prefixes_apart() -> None:
    tokens = np.arange(8, dtype=np.int32)
    assert not set(block_digests(tokens, 4)) & set(block_digests(tokens, 4, salt=b"adapter"))
