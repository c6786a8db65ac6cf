"""Committed keys on disk: each is handed out as often as it was committed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from raydata_llm.ledger_index import KEY_BYTES, KeyIndex

# Few different keys, so that there are copies; zero bytes at both ends, which text types would drop.
KEYS = st.integers(0, 12).map(lambda number: bytes([number * 21 % 256]) + bytes(KEY_BYTES - 2) + bytes([number % 3]))
BLOCKS = st.lists(st.lists(KEYS, max_size=9), max_size=6)


@settings(max_examples=60, deadline=None)
@given(BLOCKS, BLOCKS)
def test_a_key_is_found_as_often_as_it_was_committed(committed: list[list[bytes]], asked: list[list[bytes]]) -> None:
    index = KeyIndex(b"".join(block) for block in committed)
    left = Counter(key for block in committed for key in block)
    assert index.size == left.total()
    for block in asked:
        found = index.take(b"".join(block))
        for key, was_found in zip(block, found, strict=True):
            assert was_found == (left[key] > 0)
            left[key] -= bool(was_found)


def test_nothing_committed_finds_nothing() -> None:
    assert KeyIndex([]).take(bytes(3 * KEY_BYTES)).tolist() == [False] * 3
