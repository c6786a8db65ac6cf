"""The KV blocks that a set of sequences will hold at its peak, if each grows a token a step until it ends.

Owns that simulation, which admission rests on. Knows counts only.

Use only falls when a sequence ends, so it peaks at some sequence's last step: the forecast holds the use at each row's
end. A further row adds to those that end before it, and its own end is one more: a few operations on whole arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
_LongArray = npt.NDArray[np.int64]


class BlockForecast:
    """See the module's docstring.

    Args:
        num_tokens: [n] tokens held now.
        remaining: [n] tokens still to come.
        shared_blocks: [n] blocks not counted, because another sequence or the base holds them.
        block_size: Tokens of a block.
        base: Blocks held all the time.
        room: Rows that may be added.
    """

    def __init__(
        self,
        num_tokens: IntArray,
        remaining: IntArray,
        shared_blocks: IntArray,
        *,
        block_size: int,
        base: int = 0,
        room: int = 0,
    ) -> None:
        count = self._count = len(num_tokens)
        self._block_size = block_size
        self._base = base
        self._tokens, self._remaining, self._shared, self._use = np.zeros((4, count + room), dtype=np.int64)
        self._tokens[:count], self._remaining[:count], self._shared[:count] = num_tokens, remaining, shared_blocks
        self._use[:count] = _use_at_ends(num_tokens, remaining, shared_blocks, block_size)
        self.peak = base + int(self._use[:count].max(initial=0))

    @property
    def remaining(self) -> _LongArray:
        """[n] tokens still to come of each row."""
        return self._remaining[: self._count]

    def add_within(self, limit: int, num_tokens: int, remaining: int, shared_blocks: int, base: int) -> bool:
        """Add a row if the peak stays within `limit`; says whether it was.

        Args:
            base: Blocks of the shared ones that nobody held so far.
        """
        count, size = self._count, self._block_size
        ends = self._remaining[:count]
        own = -(-(num_tokens + remaining) // size) - shared_blocks
        others = -(-(self._tokens[:count] + remaining) // size) - self._shared[:count]
        last = own + int(others[ends >= remaining].sum())
        growing = -(-(num_tokens + ends) // size) - shared_blocks
        use = self._use[:count] + np.where(ends <= remaining, growing, 0)
        peak = self._base + base + max(int(use.max(initial=0)), last)
        if peak > limit:
            return False
        self._base += base
        self.peak = peak
        self._use[:count], self._use[count] = use, last
        self._tokens[count], self._remaining[count], self._shared[count] = num_tokens, remaining, shared_blocks
        self._count += 1
        return True


def _use_at_ends(num_tokens: IntArray, remaining: IntArray, shared_blocks: IntArray, block_size: int) -> _LongArray:
    """[n] blocks held at each row's last step; of rows that end together, one counts them all, the others fewer.

    With tokens = q*block_size + m and t = a*block_size + b, ceil((tokens + t) / block_size) = q + a +
    ceil((m + b) / block_size): the sum over the living needs only how many of them have each m.
    """
    count = len(num_tokens)
    order = np.argsort(remaining)[::-1]  # the first i+1 live at least until the end of the i-th
    quotient, modulo = np.divmod(num_tokens[order], block_size)
    whole, part = np.divmod(remaining[order], block_size)
    living = np.arange(1, count + 1)
    fixed = np.cumsum(quotient - shared_blocks[order]) + whole * living
    histogram = np.zeros((count, block_size), dtype=np.int64)
    histogram[np.arange(count), modulo] = 1
    ceilings = -(-np.add.outer(np.arange(block_size), np.arange(block_size)) // block_size)
    partial = (np.cumsum(histogram, axis=0) * ceilings[part]).sum(axis=1)
    use = np.empty(count, dtype=np.int64)
    use[order] = fixed + partial
    return use
