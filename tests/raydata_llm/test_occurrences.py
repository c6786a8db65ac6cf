"""Identical rows get numbers of their own, in whatever blocks they lie."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy as np

from raydata_llm.occurrences import Numbers, Occurrences


def digests(*values: int) -> Numbers:
    return np.array(values, np.uint64)


def test_copies_are_numbered_within_and_across_blocks() -> None:
    occurrences = Occurrences()
    assert occurrences.number(0, digests(5, 6, 5)) == (0, 0, 1)
    assert occurrences.number(1, digests(7, 5)) == (0, 2)
    assert occurrences.number(2, digests(6, 5, 5)) == (1, 3, 4)


def test_a_block_that_comes_again_gets_the_same_numbers() -> None:
    occurrences = Occurrences()
    first = [occurrences.number(block, digests(1, 2, 1 + block)) for block in range(3)]
    assert [occurrences.number(block, digests(1, 2, 1 + block)) for block in range(3)] == first


def test_a_row_whose_digest_is_nothing_but_zeros_counts() -> None:
    occurrences = Occurrences()
    assert occurrences.number(0, digests(0, 0)) == (0, 1)


def test_the_numbers_are_those_of_a_plain_count_when_the_table_has_grown() -> None:
    source = random.Random(7)
    occurrences, seen = Occurrences(), Counter[int]()
    # Digests that differ in their high bits alone all want the same place.
    crowd = [number << 40 for number in range(300)]
    for block in range(400):
        keys = [source.randrange(1, 200_000) for _ in range(500)] + source.sample(crowd, 10)
        expected = []
        for key in keys:
            expected.append(seen[max(1, key)])
            seen[max(1, key)] += 1
        assert occurrences.number(block, digests(*keys)) == tuple(expected)


def test_a_block_may_have_more_rows_than_the_table_has_room_for_when_doubled() -> None:
    occurrences, numbers = Occurrences(), list[tuple[int, ...]]()
    many = np.arange(1, 300_001, dtype=np.uint64)
    counting = threading.Thread(target=lambda: numbers.append(occurrences.number(0, many)), daemon=True)
    counting.start()
    counting.join(timeout=30)
    assert numbers == [(0,) * len(many)]
