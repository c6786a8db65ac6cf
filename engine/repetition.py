"""Outputs that go round in circles: `repetition_detection` ends them.

Owns what counts as a repetition, and the watch over one output. Knows no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

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
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"repetition_detection.{name}={value!r} is not valid: give a whole number, 0 or more")
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
            raise ValueError(f"repetition_detection={value!r} is not valid: give a dict of {', '.join(known)}")
        return cls(**value)


class RepetitionWatch:
    """Follows one output.

    Args:
        min_tokens: No end before.
    """

    def __init__(self, params: RepetitionDetectionParams, min_tokens: int) -> None:
        self._sizes = range(max(1, params.min_pattern_size), params.max_pattern_size + 1)
        self._count, self._min_tokens = params.min_count, min_tokens

    def advance(self, token_ids: OutputTokens) -> str | None:
        """Look at the output so far, and return the stop reason if it repeats itself."""
        if len(token_ids) <= self._min_tokens:
            return None
        return REPETITION if any(self._repeats(token_ids, size) for size in self._sizes) else None

    def _repeats(self, token_ids: OutputTokens, size: int) -> bool:
        end, span = len(token_ids), size * self._count
        return span <= end and all(
            token_ids[at] == token_ids[at - size] for at in range(end - 1, end - span + size - 1, -1)
        )
