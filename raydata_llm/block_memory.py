"""What a process remembers of a job's blocks that it finished: how many rows failed, which columns good ones had.

Tasks of one job run in a few processes that live as long as it does, so each can judge by its own share of the rows
and nobody is asked. Owns the limit of `max_error_fraction`. Knows no engine. Invariant: executions are kept apart.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

# Fewer rows than this prove nothing.
_LEAST_ROWS = 100


class TooManyErrorsError(RuntimeError):
    """More rows fail than `max_error_fraction` allows."""


class BlockMemory:
    """Of one execution of a dataset.

    Attributes:
        schema: Of the first block that had a good row.
    """

    def __init__(self) -> None:
        self.schema: pa.Schema | None = None
        self._rows = self._failed = 0
        self._causes: Counter[str] = Counter()

    def count(self, errors: Sequence[str | None], max_fraction: float | None) -> None:
        """Take in a block.

        Args:
            errors: Of each row; None is a good one.
            max_fraction: The share of rows that may fail.

        Raises:
            TooManyErrorsError: when more have.
        """
        causes = [error for error in errors if error is not None]
        self._rows, self._failed = self._rows + len(errors), self._failed + len(causes)
        if len(self._causes) < 1000:
            self._causes.update(causes)
        if max_fraction is None or self._rows < _LEAST_ROWS or self._failed <= max_fraction * self._rows:
            return
        [(cause, times)] = self._causes.most_common(1)
        raise TooManyErrorsError(
            f"max_error_fraction={max_fraction}: {self._failed} of the {self._rows} rows that this process finished "
            f"have failed, {times} of them with {cause}: mend what fails, or raise max_error_fraction"
        )


def memory_of(execution: str) -> BlockMemory:
    """This process's memory of an execution; an empty name is one of its own each time."""
    return _remembered(execution) if execution else BlockMemory()


@functools.lru_cache(maxsize=8)
def _remembered(execution: str) -> BlockMemory:
    return BlockMemory()
