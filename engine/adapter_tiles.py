"""The rows of a step that have an adapter, in the order and the tiles that the kernels take.

Owns that order. Knows no adapters but the numbers of their slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from raydata_llm.engine.sequence import IntArray
from raydata_llm.engine.upload import upload
from raydata_llm.kernels.lora import TILE_ROWS, AdapterTiles


@dataclass(frozen=True)
class AdaptedRows:
    """A step's rows with an adapter.

    Args:
        tiles: On the device.
        ranges: For each slot that occurs, where its rows stand in `tiles.rows`; on the host.
    """

    tiles: AdapterTiles
    ranges: Mapping[int, tuple[int, int]]

    def of(self, slot: int) -> torch.Tensor:
        """The rows of one slot."""
        start, end = self.ranges[slot]
        return self.tiles.rows[start:end].long()


def upload_rows(slots: IntArray, device: torch.device) -> AdaptedRows:
    """A step's rows on the device; `slots` as in `tiles_of`."""
    rows, adapters, starts, ends = upload(device, *tiles_of(slots))
    return AdaptedRows(AdapterTiles(rows=rows, slots=adapters, starts=starts, ends=ends), ranges_of(slots))


def ranges_of(slots: IntArray) -> dict[int, tuple[int, int]]:
    """`AdaptedRows.ranges`; `slots` as in `tiles_of`."""
    adapters, counts = np.unique(slots[slots >= 0], return_counts=True)
    ends = np.cumsum(counts)
    return dict(zip(adapters.tolist(), zip((ends - counts).tolist(), ends.tolist(), strict=True), strict=True))


def tiles_of(slots: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """The arrays of `AdapterTiles` for a step.

    Args:
        slots: [T] the adapter's slot of each row, -1 for none.
    """
    rows = np.flatnonzero(slots >= 0)
    rows = rows[np.argsort(slots[rows], kind="stable")]
    adapters, counts = np.unique(slots[rows], return_counts=True)
    tiles = -(-counts // TILE_ROWS)
    ends_of = np.cumsum(counts)
    firsts = np.repeat(ends_of - counts, tiles)
    starts = firsts + TILE_ROWS * (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles))
    ends = np.minimum(starts + TILE_ROWS, np.repeat(ends_of, tiles))
    return (
        rows.astype(np.int32),
        np.repeat(adapters, tiles).astype(np.int32),
        starts.astype(np.int32),
        ends.astype(np.int32),
    )


def max_tiles(num_rows: int, num_slots: int) -> int:
    """Tiles of that many rows at most."""
    return num_rows // TILE_ROWS + min(num_rows, num_slots)


class TileBuffer:
    """Tiles that never move, for CUDA graphs: as many as `max_rows` rows may make.

    Args:
        max_rows: Rows of a step at most.
        num_slots: Adapters at once.
    """

    def __init__(self, max_rows: int, num_slots: int, device: torch.device) -> None:
        self._num_slots = num_slots
        # Each part begins at 16 bytes: Triton compiles a kernel anew for pointers that do not.
        most = -(-max_tiles(max_rows, num_slots) // 4) * 4
        self._sizes = [-(-max_rows // 4) * 4, most, most, most]
        self._all = torch.full((sum(self._sizes),), -1, dtype=torch.int32, device=device)

    def fill(self, slots: IntArray) -> None:
        """Take a step's rows; tiles beyond theirs are not there."""
        padded = np.full(sum(self._sizes), -1, dtype=np.int32)
        start = 0
        for values, size in zip(tiles_of(slots), self._sizes, strict=True):
            padded[start : start + len(values)] = values
            start += size
        self._all.copy_(upload(self._all.device, padded)[0], non_blocking=True)

    def tiles(self, num_rows: int) -> AdapterTiles:
        """The tiles of a step of that many rows at most."""
        rows, slots, starts, ends = self._all.split(self._sizes)
        count = max_tiles(num_rows, self._num_slots)
        return AdapterTiles(rows=rows[:num_rows], slots=slots[:count], starts=starts[:count], ends=ends[:count])
