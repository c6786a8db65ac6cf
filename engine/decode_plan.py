"""Which slots decode, in what order, and which of them share the start of their KV.

Owns the order of a step's decode rows: groups that share a prefix first, side by side, so that attention reads what
they share once a group; then the rest, long rows first, which fills the chip best. Rows grow alike, so a plan holds
until a row joins or leaves. Knows block numbers only: rows share a prefix if their block tables begin alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydata_llm.engine.sequence import IntArray

# Groups at most; their tables on the device have this size.
MAX_GROUPS = 128
# A group's part is a launch of its own whose longest program goes through the whole prefix. Reading one key for one row
# less saves about 0.7 ns and a pass over one shared key takes 11 ns there (H200, 8 KV heads of 64), a launch 5 us.
_MIN_ROWS = 4
_TOKENS_PER_LAUNCH = 8192
_TOKENS_PER_SHARED_KEY = 16


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """An order of decode rows that lives over many steps.

    Args:
        version: Tells plans of one engine apart.
        slots: [D] slots in row order.
        group_starts: [G + 1] rows where groups begin; the last entry is where ungrouped rows do.
        group_lens: [G] tokens that a group shares, whole blocks.
    """

    version: int
    slots: IntArray
    group_starts: IntArray
    group_lens: IntArray

    @property
    def num_groups(self) -> int:
        """Groups that share a prefix."""
        return len(self.group_lens)

    @property
    def row_lens(self) -> IntArray:
        """[D] tokens that each row shares with its group."""
        lens = np.zeros(len(self.slots), dtype=np.int32)
        lens[: self.group_starts[-1]] = np.repeat(self.group_lens, np.diff(self.group_starts))
        return lens


@dataclass(frozen=True)
class _Group:
    rows: IntArray
    num_blocks: int

    @property
    def saved(self) -> int:
        """Block reads that sharing spares."""
        return (len(self.rows) - 1) * self.num_blocks


def plan_decode(
    version: int,
    slots: IntArray,
    block_tables: IntArray,
    num_blocks: IntArray,
    num_tokens: IntArray,
    block_size: int,
    *,
    share_prefixes: bool,
) -> DecodePlan:
    """Order decode rows.

    Args:
        slots: [D].
        block_tables: [D, columns] of the same rows, of which the first `num_blocks` are theirs.
        num_blocks: [D].
        num_tokens: [D] tokens attended to.
        share_prefixes: Whether to look for groups.
    """
    groups = _worthwhile(_find_groups(block_tables, num_blocks), block_size) if share_prefixes else []
    order = np.argsort(-num_tokens, kind="stable")
    if groups:
        group_of = np.full(len(slots), len(groups))
        for index, group in enumerate(groups):
            group_of[group.rows] = index
        order = order[np.argsort(group_of[order], kind="stable")]
    sizes = [len(group.rows) for group in groups]
    return DecodePlan(
        version=version,
        slots=slots[order],
        group_starts=np.cumsum([0, *sizes], dtype=np.int32),
        group_lens=np.array([group.num_blocks * block_size for group in groups], dtype=np.int32),
    )


def _find_groups(block_tables: IntArray, num_blocks: IntArray) -> list[_Group]:
    rows = np.flatnonzero(num_blocks > 0).astype(np.int32)
    return _groups_within(rows, 0, block_tables, num_blocks)


def _groups_within(rows: IntArray, depth: int, block_tables: IntArray, num_blocks: IntArray) -> list[_Group]:
    """Groups among rows whose first `depth` blocks are the same: by their next block, each split further if it pays."""
    rows = rows[num_blocks[rows] > depth]
    if len(rows) < _MIN_ROWS:
        return []
    _, cluster_of, sizes = np.unique(block_tables[rows, depth], return_inverse=True, return_counts=True)
    groups = []
    for cluster in np.flatnonzero(sizes >= _MIN_ROWS).tolist():
        members = rows[cluster_of == cluster]
        common = depth + _num_common(block_tables[members, depth : int(num_blocks[members].min())])
        whole = _Group(members, common)
        parts = _groups_within(members, common, block_tables, num_blocks)
        groups += parts if sum(part.saved for part in parts) > whole.saved else [whole]
    return groups


def _num_common(tables: IntArray) -> int:
    """Leading columns in which all rows are equal."""
    same = (tables == tables[0]).all(axis=0)
    return len(same) if same.all() else int(np.argmin(same))


def _worthwhile(groups: list[_Group], block_size: int) -> list[_Group]:
    """The groups that together spare more than they cost: without the longest ones while those cost too much."""
    groups = sorted(groups, key=lambda group: group.saved, reverse=True)[:MAX_GROUPS]
    groups.sort(key=lambda group: group.num_blocks, reverse=True)
    while groups:
        saved = sum(group.saved for group in groups) * block_size
        if saved >= _TOKENS_PER_LAUNCH + _TOKENS_PER_SHARED_KEY * groups[0].num_blocks * block_size:
            return groups
        del groups[0]
    return []
