"""Outputs that go round in circles: found where a plain search finds them, at a bounded cost."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from raydata_llm.engine.repetition import REPETITION, RepetitionDetectionParams, RepetitionWatch


def repeats(tokens: list[int], params: RepetitionDetectionParams) -> bool:
    """Whether it ends in a pattern, by the definition."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        span = size * params.min_count
        if span <= len(tokens) and tokens[-span:] == tokens[len(tokens) - size :] * params.min_count:
            return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(2, 5),
    st.integers(0, 12),
)
def test_it_ends_where_a_plain_search_says(
    tokens: list[int], largest: int, smallest: int, count: int, min_tokens: int
) -> None:
    params = RepetitionDetectionParams(
        max_pattern_size=largest, min_pattern_size=min(smallest, largest), min_count=count
    )
    watch = RepetitionWatch(params, min_tokens, most_tokens=40)
    for length in range(1, len(tokens) + 1):
        expected = length > min_tokens and repeats(tokens[:length], params)
        assert watch.advance(np.array(tokens[:length], dtype=np.int32)) == (REPETITION if expected else None)


def test_patterns_that_no_output_has_room_for_cost_nothing() -> None:
    params = RepetitionDetectionParams(max_pattern_size=2**70, min_count=2)
    watch = RepetitionWatch(params, 0, most_tokens=40)
    tokens = np.arange(40, dtype=np.int32)
    assert watch.advance(tokens) is None
    assert len(watch._sizes) == 20
