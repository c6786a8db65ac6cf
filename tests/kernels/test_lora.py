"""LoRA additions: the reference against plain products, the kernel against the reference, and the tiling of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raydata_llm.engine.adapter_tiles import max_tiles, tiles_of
from raydata_llm.kernels.lora import TILE_ROWS, AdapterTiles, Affine, add_lora

NONE = -1


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    drawn: torch.Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5
    return drawn.to(device, dtype)


def tiles_on(device: torch.device, slots: list[int], padding: int = 0) -> AdapterTiles:
    rows, adapters, starts, ends = tiles_of(np.array(slots, dtype=np.int32))
    adapters = np.concatenate([adapters, np.full(padding, NONE, dtype=np.int32)])
    starts, ends = (np.concatenate([one, np.full(padding, 10**6, dtype=np.int32)]) for one in (starts, ends))
    return AdapterTiles(
        **{
            name: torch.from_numpy(one).to(device)
            for name, one in {"rows": rows, "slots": adapters, "starts": starts, "ends": ends}.items()
        }
    )


@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, 200])
def test_tiles_hold_every_row_with_an_adapter_once(num_rows: int) -> None:
    slots = np.random.default_rng(num_rows).integers(-1, 5, num_rows).astype(np.int32)
    rows, adapters, starts, ends = tiles_of(slots)
    assert sorted(rows.tolist()) == np.flatnonzero(slots >= 0).tolist()
    for adapter, start, end in zip(adapters, starts, ends, strict=True):
        assert 0 < end - start <= TILE_ROWS and (slots[rows[start:end]] == adapter).all()
    assert (ends - starts).sum() == len(rows) and len(adapters) <= max_tiles(num_rows, 5)


def affine_of(slots: int, outputs: int, device: torch.device) -> Affine:
    """Every other slot is affine; what the rest would be is not to be read."""
    chosen = (torch.arange(slots) % 2).to(device, torch.int32)
    nothing = torch.where(chosen == 1, 0.0, torch.nan)[:, None]
    drawn = {"dtype": torch.float32, "device": device}
    return Affine(
        draw(slots, outputs, seed=8, **drawn) + 1 + nothing,  # type: ignore[arg-type]
        draw(slots, outputs, seed=9, **drawn) + nothing,  # type: ignore[arg-type]
        chosen,
    )


def plainly(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    affine: Affine,
    slots: list[int],
    parts: tuple[int, ...],
) -> torch.Tensor:
    """Row by row, a part's A and B cut out by hand."""
    out, rank = y.double().clone(), b.shape[2]
    for row, slot in enumerate(slots):
        column = 0
        for part, width in enumerate(parts if slot >= 0 else ()):
            inner = a[slot, part * rank : (part + 1) * rank].double() @ x[row].double()
            out[row, column : column + width] += b[slot, column : column + width].double() @ inner
            column += width
        if slot >= 0 and affine.slots[slot]:
            out[row] = out[row] * affine.gain[slot].double() + affine.shift[slot].double()
    return out


SLOTS = [[NONE, 0, 2, 0], [1] * 20 + [0], [NONE] * 3]


@pytest.mark.parametrize("slots", SLOTS, ids=["few", "two tiles", "none"])
@pytest.mark.parametrize("parts", [(24,), (40, 8, 8), (33, 33)], ids=str)
def test_rows_get_the_addition_of_their_adapter(slots: list[int], parts: tuple[int, ...]) -> None:
    cpu = torch.device("cpu")
    make = {"dtype": torch.float32, "device": cpu}
    x, y = draw(len(slots), 72, seed=0, **make), draw(len(slots), sum(parts), seed=1, **make)  # type: ignore[arg-type]
    a, b = draw(3, len(parts) * 6, 72, seed=2, **make), draw(3, sum(parts), 6, seed=3, **make)  # type: ignore[arg-type]
    affine = affine_of(3, sum(parts), cpu)
    wanted = plainly(y, x, a, b, affine, slots, parts)
    add_lora(y, x, a, b, affine, tiles_on(cpu, slots), parts)
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=1e-5)
