"""A result's log-probabilities: kept as the device wrote them, read as a list.

Owns the field. vLLM's users do with the lists what one does with lists (`isinstance`, `+`, JSON), which a lazy sequence
cannot stand in for; most results are never asked, so the list is made when the field is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ListedPositions:
    """A dataclass's field whose `PositionLogprobs` are read as a list; anything else reads as it was set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._kept = f"_{name}"

    def __get__(self, result: Any, owner: type | None = None) -> Any:
        if result is None:
            return None  # the field's default
        kept = result.__dict__[self._kept]
        return kept.as_list() if hasattr(kept, "as_list") else kept

    def __set__(self, result: Any, positions: Sequence[Any] | None) -> None:
        result.__dict__[self._kept] = positions


def kept_positions(result: Any, field: str) -> Any:
    """What such a field holds, without making the list."""
    return result.__dict__[f"_{field}"]
