"""Outputs that go round in circles: `repetition_detection` ends them.

Owns what counts as a repetition, and the watch over one output. Knows no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from raydata_llm.engine.param_values import invalid, read_count

if TYPE_CHECKING:
    from raydata_llm.engine.detokenizer import OutputTokens

# The `stop_reason` of an output that was ended for it, vLLM's.
REPETITION = "repetition_detected"


@dataclass(frozen=True)
class RepetitionDetectionParams:
    """When an output is ended: as soon as it ends in a pattern of tokens, `min_count` times over.

    Args:
        max_pattern_size: Tokens of a pattern at most; 0 looks for none.
        min_pattern_size: Tokens of a pattern at least; 0 is 1.
        min_count: How often, 2 or more.

    Raises:
        ValueError: naming the field.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            name = f"repetition_detection.{field.name}"
            value = read_count(name, getattr(self, field.name), optional=False)
            if value is None or value < 0:
                raise invalid(name, value, "give a whole number, 0 or more")
            object.__setattr__(self, field.name, value)
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"repetition_detection.min_pattern_size={self.min_pattern_size} is not valid: it may not exceed "
                f"max_pattern_size={self.max_pattern_size}"
            )
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError(f"repetition_detection.min_count={self.min_count} is not valid: give 2 or more")

    @classmethod
    def from_value(cls, value: Any) -> RepetitionDetectionParams:
        """A ready object, or a dict of its fields."""
        if isinstance(value, cls):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise invalid("repetition_detection", value, f"give a dict of {', '.join(known)}")
        return cls(**value)


class RepetitionWatch:
    """Follows one output.

    For each pattern size it counts how many tokens, up to the last, are equal to the one a pattern before: as many as
    min_count - 1 patterns have are a repetition. So a token costs one comparison of arrays, however long patterns are.

    Args:
        min_tokens: No end before.
        most_tokens: That the output may have; patterns that cannot repeat so far are not looked for.
    """

    def __init__(self, params: RepetitionDetectionParams, min_tokens: int, most_tokens: int) -> None:
        largest = min(params.max_pattern_size, most_tokens // params.min_count)
        self._sizes = np.arange(max(1, params.min_pattern_size), largest + 1, dtype=np.int64)
        self._needed = self._sizes * (params.min_count - 1)
        self._equal = np.zeros(len(self._sizes), dtype=np.int64)
        self._min_tokens, self._num_seen = min_tokens, 0

    def advance(self, token_ids: OutputTokens) -> str | None:
        """Look at the output so far, and return the stop reason if it repeats itself."""
        tokens = np.asarray(token_ids)
        for last in range(self._num_seen, len(tokens)):
            # Sizes beyond the output's start have nothing to compare with.
            sizes = self._sizes[: np.searchsorted(self._sizes, last, side="right")]
            equal = self._equal[: len(sizes)]
            equal += 1
            equal[tokens[last - sizes] != tokens[last]] = 0
        self._num_seen = len(tokens)
        if len(tokens) <= self._min_tokens:
            return None
        return REPETITION if (self._equal >= self._needed).any() else None
