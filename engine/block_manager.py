"""KV blocks: who holds which, and which hold a prompt prefix that can be shared.

Owns the block pool: free blocks, reference counts, and the order in which cached blocks that nobody holds are given
up. Knows block numbers only; what a block holds is the model runner's matter.

Invariant (`check_integrity`): every block is exactly one of trash (block 0, where padding writes), free, held
(reference count above 0), or cached and held by no one (evictable, least recently used first).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.prefix_cache import ROOT, PrefixCache

BlockArray = npt.NDArray[np.int32]
TRASH_BLOCK = 0

# Free blocks are put in order once this share of them has come back.
_SORTED_AFTER = 0.25


class BlockManager:
    """A pool of `num_blocks` blocks, block 0 being the trash block that is never handed out."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks} is not valid: give 2 or more (one is the trash block)")
        self.num_blocks = num_blocks
        self._references = np.zeros(num_blocks, dtype=np.int32)
        # A stack with the lowest numbers on top. Rows that start a block in the same step get neighbours then, which
        # attention reads faster than blocks in any order.
        self._free = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)
        self._num_free = num_blocks - 1
        self._num_unsorted = 0
        self._cache = PrefixCache(num_blocks)
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can hold at once."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now, evicting cached ones."""
        return self._num_free + len(self._evictable)

    @property
    def num_held(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_usable - self.num_available

    def allocate(self, count: int) -> BlockArray:
        """Take `count` blocks, each with one reference; the caller has checked `num_available`."""
        assert count <= self.num_available, f"{count} blocks asked, {self.num_available} available"
        self._evict(count - self._num_free)
        if self._num_unsorted > self._num_free * _SORTED_AFTER:
            self._free[: self._num_free] = np.sort(self._free[: self._num_free])[::-1]
            self._num_unsorted = 0
        self._num_free -= count
        blocks = self._free[self._num_free : self._num_free + count][::-1].copy()
        self._references[blocks] = 1
        return blocks

    def share(self, blocks: BlockArray) -> None:
        """Take one more reference on blocks that `match` returned."""
        for block in blocks[self._references[blocks] == 0].tolist():
            del self._evictable[block]
        self._references[blocks] += 1

    def free(self, blocks: BlockArray) -> None:
        """Give back one reference on each of a sequence's blocks (in sequence order, each at most once)."""
        references = self._references[blocks] - 1
        self._references[blocks] = references
        released = blocks[references == 0]
        assert (references >= 0).all(), "a block was freed twice"
        cached = self._cache.known(released)
        # Deepest first: a prefix is worth nothing without the blocks before it.
        for block in released[cached][::-1].tolist():
            self._evictable[block] = None
        self._push_free(released[~cached])

    def register(self, block: int, node: int, tokens: bytes) -> int:
        """Let later sequences find a held block that continues the prefix `node` with `tokens`; returns its node."""
        return self._cache.add(node, tokens, block)

    def match(self, tokens: bytes, width: int, limit: int, root: int = ROOT) -> tuple[BlockArray, int]:
        """The blocks of the longest cached prefix, not yet shared, and its node; arguments as `PrefixCache.match`."""
        blocks, node = self._cache.match(tokens, width, limit, root)
        return np.array(blocks, dtype=np.int32), node

    def num_evictable(self, blocks: BlockArray) -> int:
        """How many of `blocks` nobody holds: sharing them takes them from `num_available`."""
        return int((self._references[blocks] == 0).sum())

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; blocks in use stay with their sequences."""
        self._push_free(np.fromiter(self._evictable, dtype=np.int32, count=len(self._evictable)))
        self._evictable.clear()
        self._cache.clear()

    def _evict(self, count: int) -> None:
        if count <= 0:
            return
        blocks = [self._evictable.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._cache.forget(block)
        self._push_free(np.array(blocks, dtype=np.int32))

    def _push_free(self, blocks: BlockArray) -> None:
        self._free[self._num_free : self._num_free + len(blocks)] = blocks
        self._num_free += len(blocks)
        self._num_unsorted += len(blocks)

    def check_integrity(self, held: Iterable[BlockArray]) -> None:
        """Assert the invariant, given the blocks of every live sequence."""
        expected = np.zeros(self.num_blocks, dtype=np.int32)
        for blocks in held:
            np.add.at(expected, blocks, 1)
        free = self._free[: self._num_free].tolist()
        evictable = list(self._evictable)
        assert (expected == self._references).all(), "reference counts differ from what sequences hold"
        assert TRASH_BLOCK not in free and TRASH_BLOCK not in evictable and expected[TRASH_BLOCK] == 0
        assert sorted([*free, *evictable, *np.flatnonzero(expected).tolist()]) == list(range(1, self.num_blocks))
        self._cache.check_integrity()
        assert all(block in self._cache for block in evictable)
        assert not any(block in self._cache for block in free)
