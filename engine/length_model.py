"""How long outputs get, learned from those that finished, and the KV blocks that a set of sequences will need.

Owns the prediction that admission rests on. Knows counts only. A prediction is never a promise: rows that outgrow it
cost a preemption, not a wrong result.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
# Fewer finished rows say nothing yet: every row counts with all it may write.
_MIN_FINISHED = 64
_WINDOW = 2048
# Room above the conditional mean, in standard deviations: at 0 every second row outgrows its prediction.
_MARGIN = 0.25


class LengthModel:
    """Expected output lengths, as fractions of what rows may write (tokasaurus' early-stopping buffer).

    Rows that cannot stop early are no evidence and are taken at their full length.
    """

    def __init__(self) -> None:
        self._fractions = np.zeros(_WINDOW)
        self._count = 0
        self._sorted: npt.NDArray[np.float64] | None = None

    def observe(self, num_output: int, max_output: int) -> None:
        """Take in a row that finished and could have stopped early."""
        self._fractions[self._count % _WINDOW] = num_output / max_output
        self._count += 1
        self._sorted = None

    def predict(self, num_output: IntArray, max_output: IntArray, may_stop: npt.NDArray[np.bool_]) -> IntArray:
        """Expected final output lengths of rows that have written `num_output` tokens, each at most `max_output`."""
        if self._count < _MIN_FINISHED:
            return max_output
        tail_expectation, fractions = self._tails()
        longer = np.searchsorted(fractions, num_output / max_output, side="right")
        # Less a hair, so that rounding does not make 11 of 0.1 * 100.
        expected = np.ceil(tail_expectation[longer] * max_output - 1e-6).astype(np.int32)
        return np.where(may_stop, np.clip(expected, np.minimum(num_output + 1, max_output), max_output), max_output)

    def _tails(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Per rank i: mean + margin of the fractions from i on (1.0 past the last)."""
        if self._sorted is None:
            self._sorted = np.sort(self._fractions[: min(self._count, _WINDOW)])
        fractions = self._sorted
        sizes = np.arange(len(fractions), 0, -1)
        mean = np.cumsum(fractions[::-1])[::-1] / sizes
        variance = np.cumsum(fractions[::-1] ** 2)[::-1] / sizes - mean**2
        expected = mean + _MARGIN * np.sqrt(np.maximum(variance, 0.0))
        return np.append(np.minimum(expected, 1.0), 1.0), fractions


def peak_blocks(num_tokens: IntArray, remaining: IntArray, shared_blocks: IntArray, block_size: int) -> int:
    """Most blocks held at one time if each sequence grows a token a step and gives its blocks back at its end.

    Use only falls when a sequence ends, so it peaks at some sequence's last step. With tokens = q*block_size + m and
    t = a*block_size + b, ceil((tokens + t) / block_size) = q + a + ceil((m + b) / block_size): the sum over the living
    needs only how many of them have each m.

    Args:
        num_tokens: [n] tokens held now.
        remaining: [n] tokens still to come.
        shared_blocks: [n] blocks not counted, because another sequence or the base holds them.
    """
    if len(num_tokens) == 0:
        return 0
    order = np.argsort(remaining)[::-1]  # the first i+1 live at least until the end of the i-th
    quotient, modulo = np.divmod(num_tokens[order], block_size)
    whole, part = np.divmod(remaining[order], block_size)
    living = np.arange(1, len(order) + 1)
    fixed = np.cumsum(quotient - shared_blocks[order]) + whole * living
    histogram = np.zeros((len(order), block_size), dtype=np.int64)
    histogram[np.arange(len(order)), modulo] = 1
    ceilings = -(-np.add.outer(np.arange(block_size), np.arange(block_size)) // block_size)
    partial = (np.cumsum(histogram, axis=0) * ceilings[part]).sum(axis=1)
    return int((fixed + partial).max())
