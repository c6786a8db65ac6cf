"""How many rows to run in a round, where memory does not hold all that wait and rows end together.

Owns the trade between more rows and a cheaper step: a step takes the time of the next larger number of rows that there
is a graph for (`decode_buckets.py`), so the last few that fit may cost more than they are worth. On an H100 a step of
an 8b model, attention apart, is taken to need 14.7 ms for 641 to 768 rows, 9.2 for 384 and 10.1 for 512: where some 700
of 1,024 rows fit, two rounds of 512 are done first.
Knows no requests and no blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Of numbers that take about as long, the largest.
_TOLERANCE = 0.05
# Of what fits, at least this share: how many that is, is an estimate.
_LEAST_SHARE = 0.75


class RowTarget:
    """See the module's docstring.

    Args:
        seconds: Numbers of rows that a step can be padded to, and what it takes then, without what depends on the rows'
            lengths. None, and all rows that fit are run.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._sizes = np.array(sorted(seconds), dtype=np.int64)
        self._seconds = np.array([0.0, *(seconds[size] for size in self._sizes.tolist())])

    def of(self, num_fitting: int, num_total: int) -> int:
        """Rows to run at once: those that do all in the least time.

        Args:
            num_fitting: Rows that memory holds.
            num_total: Rows that run or wait.
        """
        if not 0 < num_fitting < num_total or not len(self._sizes) or num_fitting > self._sizes[-1]:
            return num_fitting
        worthy = (self._sizes >= _LEAST_SHARE * num_fitting) & (self._sizes < num_fitting)
        choices = np.append(self._sizes[worthy], num_fitting)
        rounds, rest = np.divmod(num_total, choices)
        took = rounds * self._step_seconds(choices) + self._step_seconds(rest)
        return int(choices[took <= took.min() * (1 + _TOLERANCE)][-1])

    def _step_seconds(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        seconds: npt.NDArray[np.float64] = self._seconds[np.where(rows > 0, np.searchsorted(self._sizes, rows) + 1, 0)]
        return seconds
