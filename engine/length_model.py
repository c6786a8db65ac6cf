"""How long outputs get, learned from those that finished and those that still run.

Owns the prediction that admission rests on. Knows counts only. A prediction is never a promise: rows that outgrow it
cost a preemption, not a wrong result.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
_FloatArray = npt.NDArray[np.float64]
# Fewer finished rows say nothing yet: every row counts with all it may write.
_MIN_FINISHED = 16
_WINDOW = 2048
# Consecutive multiples of it, modulo 1, lie as evenly as can be.
_GOLDEN = 0.6180339887498949


class LengthModel:
    """A draw of each row's output length from what is known of lengths, as fractions of what rows may write.

    Draws, not means: rows that end at different times need fewer blocks at once than rows that all last the mean. Each
    row keeps its place in the distribution, and the places lie evenly, so that many rows' draws together are no gamble.

    The distribution is the product-limit estimate (Kaplan and Meier, 1958): finished rows are ends, rows that run are
    known to be longer than what they have written; without them, short rows, which finish first, would be all there
    is. Past the longest that has ended, rows go on ending at the mean rate. Rows that cannot stop early are no evidence
    and are taken at their full length.
    """

    def __init__(self) -> None:
        self._fractions = np.zeros(_WINDOW)
        self._count = 0
        self._ended = self._survival = np.zeros(0)
        self._rate = 0.0

    @property
    def num_finished(self) -> int:
        """Rows that were taken in."""
        return self._count

    def observe(self, num_output: int, max_output: int) -> None:
        """Take in a row that finished and could have stopped early."""
        self._fractions[self._count % _WINDOW] = num_output / max_output
        self._count += 1

    def take_running(self, num_output: IntArray, max_output: IntArray) -> None:
        """Take in what the rows that run have written, and all that has finished; `predict` goes by it.

        Args:
            num_output: [n] tokens written, of rows that could stop.
            max_output: [n] tokens that may be written.
        """
        self._ended = np.sort(self._fractions[: min(self._count, _WINDOW)])
        running = np.sort(num_output / max_output)
        self._survival = np.append(1.0, _survival(self._ended, running))
        self._rate = len(self._ended) / max(self._ended.sum() + running.sum(), 1e-9)

    def predict(
        self,
        num_output: IntArray,
        max_output: IntArray,
        may_stop: npt.NDArray[np.bool_],
        row_ids: npt.NDArray[np.int64],
    ) -> IntArray:
        """Drawn final output lengths of rows.

        Args:
            num_output: [n] tokens written.
            max_output: [n] tokens that may be written.
            may_stop: [n] whether a row can end before that.
            row_ids: [n] numbers that tell rows apart, given one after the other.
        """
        ended, survival = self._ended, self._survival
        if len(ended) < _MIN_FINISHED:
            return max_output
        written = num_output / max_output
        longer = survival[np.searchsorted(ended, written, side="right")]
        goal = longer * (1.0 - row_ids * _GOLDEN % 1.0)
        end = np.searchsorted(-survival[1:], -goal)
        tail = np.maximum(ended[-1], written) + np.log(np.minimum(survival[-1], longer) / goal) / self._rate
        drawn = np.where(end < len(ended), ended[np.minimum(end, len(ended) - 1)], tail)
        # Less a hair, so that rounding does not make 11 of 0.1 * 100.
        length = np.ceil(np.minimum(drawn, 1.0) * max_output - 1e-6).astype(np.int32)
        return np.where(may_stop, np.clip(length, np.minimum(num_output + 1, max_output), max_output), max_output)


def _survival(ended: _FloatArray, running: _FloatArray) -> _FloatArray:
    """The share of rows that is longer than each of the sorted ends; never 0."""
    at_risk = np.arange(len(ended), 0, -1) + len(running) - np.searchsorted(running, ended)
    # With nobody left at risk, half a row is.
    survival: _FloatArray = np.cumprod(1.0 - 1.0 / np.maximum(at_risk, 2))
    return survival
