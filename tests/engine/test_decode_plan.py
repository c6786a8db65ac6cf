"""The order of decode rows: groups with a common prefix side by side, the rest long rows first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydata_llm.engine import decode_plan
from raydata_llm.engine.decode_plan import DecodePlan, plan_decode

BLOCK_SIZE = 16


@pytest.fixture
def free_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups cost nothing, so that small examples form them."""
    monkeypatch.setattr(decode_plan, "_MIN_ROWS", 2)
    monkeypatch.setattr(decode_plan, "_TOKENS_PER_LAUNCH", 0)
    monkeypatch.setattr(decode_plan, "_TOKENS_PER_SHARED_KEY", 0)


def plan(tables: list[list[int]], tokens: list[int] | None = None) -> DecodePlan:
    widest = max(map(len, tables), default=0)
    padded = np.array([[*table, *[7] * (widest - len(table))] for table in tables], dtype=np.int32)
    num_blocks = np.array(list(map(len, tables)), dtype=np.int32)
    num_tokens = np.array(tokens or num_blocks * BLOCK_SIZE, dtype=np.int32)
    slots = np.arange(100, 100 + len(tables), dtype=np.int32)
    return plan_decode(
        1, slots, padded.reshape(len(tables), widest), num_blocks, num_tokens, BLOCK_SIZE, share_prefixes=True
    )


def groups(made: DecodePlan) -> list[tuple[set[int], int]]:
    """(rows, blocks) of each group."""
    starts = made.group_starts
    members = [made.slots[starts[g] : starts[g + 1]] - 100 for g in range(made.num_groups)]
    return [(set(rows.tolist()), int(n) // BLOCK_SIZE) for rows, n in zip(members, made.group_lens, strict=True)]


def test_no_rows() -> None:
    made = plan([])
    assert len(made.slots) == 0 and made.num_groups == 0


def test_rows_that_share_nothing_come_long_ones_first() -> None:
    made = plan([[1], [2], [3], [4]], tokens=[5, 16, 9, 12])
    assert made.slots.tolist() == [101, 103, 102, 100] and made.num_groups == 0


@pytest.mark.usefixtures("free_sharing")
def test_groups_come_first_and_say_what_they_share() -> None:
    made = plan([[1, 2, 3], [9, 8], [1, 2, 4], [9, 6], [5]])
    assert groups(made) == [({0, 2}, 2), ({1, 3}, 1)]
    assert made.row_lens.tolist() == [32, 32, 16, 16, 0] and made.slots[4] == 104


@pytest.mark.usefixtures("free_sharing")
def test_a_prefix_of_all_gives_way_to_longer_ones_of_some() -> None:
    deep = [[1, 10, 11, 12, 13, row] for row in range(50, 53)] + [[1, 20, 21, 22, 23, row] for row in range(60, 63)]
    assert groups(plan(deep)) == [({0, 1, 2}, 5), ({3, 4, 5}, 5)]
    shallow = [[1, 2, 3, 4, row, row + 100] for row in (10, 10, 20, 20)]
    assert groups(plan(shallow)) == [({0, 1, 2, 3}, 4)]


@pytest.mark.usefixtures("free_sharing")
def test_what_a_row_does_not_hold_is_not_shared() -> None:
    """Columns past a row's end are stale."""
    assert groups(plan([[1, 7, 7], [1], [1, 7]])) == [({0, 1, 2}, 1)]


def test_a_group_must_be_worth_its_launch() -> None:
    few = [[1, 2, row] for row in range(10, 14)]
    assert plan(few).num_groups == 0
    many = [[*range(1, 33), row] for row in range(100, 140)]
    assert groups(plan(many)) == [(set(range(40)), 32)]


def test_a_long_prefix_of_few_rows_does_not_keep_others_from_sharing() -> None:
    long = [[*range(1000, 3000), row] for row in range(5000, 5004)]
    many = [[*range(1, 33), row] for row in range(100, 140)]
    assert groups(plan([*long, *many])) == [(set(range(4, 44)), 32)]


@pytest.mark.usefixtures("free_sharing")
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=24))
def test_a_plan_is_a_permutation_whose_groups_share_what_they_say(paths: list[list[int]]) -> None:
    # Block numbers that are equal only where all before are, as the block manager's are.
    numbers: dict[tuple[int, ...], int] = {}
    tables = [
        [numbers.setdefault(tuple(path[: depth + 1]), len(numbers) + 1) for depth in range(len(path))] for path in paths
    ]
    made = plan(tables)
    assert sorted(made.slots.tolist()) == list(range(100, 100 + len(tables)))
    for rows, num_blocks in groups(made):
        assert len({tuple(tables[row][:num_blocks]) for row in rows}) == 1 and len(rows) >= 2
        assert all(len(tables[row]) >= num_blocks for row in rows) and num_blocks > 0
