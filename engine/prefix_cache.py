"""Which block holds the KV of which prompt prefix: a tree whose edges are the tokens of one block each.

Owns the tree alone; who holds a block is the block manager's matter. Tokens are compared, not hashes of them, so two
prefixes are never taken for each other.

Invariant: a node's number is never used twice. What stood below a node that is gone can then never be found under
another prefix; it is forgotten when its own block is.
"""

from __future__ import annotations

import numpy as np

ROOT = 0
_NOTHING: tuple[int, bytes, list[int], int] = (ROOT, b"", [], ROOT)


class PrefixCache:
    """A tree over at most `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        # (parent's node, the block's tokens) -> block
        self._block_of: dict[tuple[int, bytes], int] = {}
        self._edge_of: dict[int, tuple[int, bytes]] = {}
        self._node_of = np.zeros(num_blocks, dtype=np.int64)
        # Which blocks `_edge_of` has, for questions about many at once.
        self._is_known = np.zeros(num_blocks, dtype=bool)
        self._num_nodes = 1
        # What was found last: the root, a prefix's tokens, blocks and node. Sequences that begin alike come one after
        # the other.
        self._last: tuple[int, bytes, list[int], int] = _NOTHING

    def __contains__(self, block: int) -> bool:
        return block in self._edge_of

    def __len__(self) -> int:
        return len(self._edge_of)

    def match(self, tokens: bytes, width: int, limit: int, root: int = ROOT) -> tuple[list[int], int]:
        """The blocks of the longest known prefix, and its node.

        Args:
            tokens: A sequence's tokens, as bytes.
            width: Bytes of a block's tokens.
            limit: Blocks to look for at most.
            root: Where to begin: 0, or a negative number for KV of another kind (of an adapter), a tree of its own.
        """
        last_root, known, blocks, node = self._last
        if root != last_root or len(blocks) > limit or not tokens.startswith(known):
            blocks, node = [], root
        blocks = blocks.copy()
        for start in range(len(blocks) * width, limit * width, width):
            block = self._block_of.get((node, tokens[start : start + width]))
            if block is None:
                break
            blocks.append(block)
            node = int(self._node_of[block])
        self._last = (root, tokens[: len(blocks) * width], blocks, node)
        return blocks, node

    def add(self, node: int, edge: bytes, block: int) -> int:
        """Let later sequences find `block` below `node`; a prefix that has a block keeps it.

        Returns:
            The prefix's node.
        """
        known = self._block_of.get((node, edge))
        if known is not None:
            return int(self._node_of[known])
        assert block not in self._edge_of, f"block {block} holds another prefix"
        self._block_of[node, edge] = block
        self._edge_of[block] = (node, edge)
        self._is_known[block] = True
        self._node_of[block] = self._num_nodes
        self._num_nodes += 1
        return self._num_nodes - 1

    def forget(self, block: int) -> None:
        """Take a block out."""
        del self._block_of[self._edge_of.pop(block)]
        self._is_known[block] = False
        self._last = _NOTHING

    def known(self, blocks: np.typing.NDArray[np.int32]) -> np.typing.NDArray[np.bool_]:
        """Which of the blocks hold a prefix."""
        return self._is_known[blocks]

    def clear(self) -> None:
        """Forget everything."""
        self._block_of.clear()
        self._edge_of.clear()
        self._is_known[:] = False
        self._last = _NOTHING

    def check_integrity(self) -> None:
        """Assert that both directions agree."""
        assert {block: edge for edge, block in self._block_of.items()} == self._edge_of
        assert np.flatnonzero(self._is_known).tolist() == sorted(self._edge_of)
