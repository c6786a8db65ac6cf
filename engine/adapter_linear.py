"""One linear's adapters on the device: A and B of every slot, with gains and shifts, and what DoRA measures.

Owns their layout. Knows no adapter's files and no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raydata_llm.kernels.lora import AdapterTiles, Affine, add_lora

# Bytes of a weight in float32 at once, while it is measured.
_MEASURED_BYTES = 64 << 20


@dataclass(frozen=True)
class LinearAdapters:
    """One fused linear's part of all slots.

    Args:
        a: [slots, parts * R, in].
        b: [slots, out, R].
        affine: Gains and shifts.
        parts: Outputs of each part.
    """

    a: torch.Tensor
    b: torch.Tensor
    affine: Affine
    parts: tuple[int, ...]

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        inputs: int,
        parts: tuple[int, ...],
        max_rank: int,
        dtype: torch.dtype,
        affine: torch.Tensor,
    ) -> LinearAdapters:
        """Room for all slots.

        Args:
            affine: [slots] int32 on the device; which slots are affine.
        """
        outputs, device = sum(parts), affine.device
        return cls(
            a=torch.zeros((num_slots, len(parts) * max_rank, inputs), dtype=dtype, device=device),
            b=torch.zeros((num_slots, outputs, max_rank), dtype=dtype, device=device),
            affine=Affine(
                gain=torch.ones((num_slots, outputs), device=device),
                shift=torch.zeros((num_slots, outputs), device=device),
                slots=affine,
            ),
            parts=parts,
        )

    def clear(self, slot: int) -> None:
        """Let the slot change nothing."""
        self.a[slot].zero_()
        self.b[slot].zero_()
        self.affine.gain[slot].fill_(1.0)
        self.affine.shift[slot].zero_()

    def add(self, y: torch.Tensor, x: torch.Tensor, tiles: AdapterTiles) -> torch.Tensor:
        """The linear's output y with what the adapters change, in place; x is its input."""
        add_lora(y, x, self.a, self.b, self.affine, tiles, self.parts)
        return y


def row_squares(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each row of W + B A, in float32, a few rows at a time.

    Args:
        weight: [out, in].
        a: [R, in].
        b: [out, R], scaled.
    """
    rows_at_once = max(1, _MEASURED_BYTES // (4 * weight.shape[1]))
    pieces = zip(weight.split(rows_at_once), b.split(rows_at_once), strict=True)
    return torch.cat([torch.addmm(rows.float(), b_rows, a).square().sum(1) for rows, b_rows in pieces])


def column_squares(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each column of W + A B, in float32, a few rows at a time.

    Args:
        weight: [tokens, hidden].
        a: [tokens, R].
        b: [R, hidden], scaled.
    """
    rows_at_once = max(1, _MEASURED_BYTES // (4 * weight.shape[1]))
    squares = torch.zeros(weight.shape[1], device=weight.device)
    for rows, a_rows in zip(weight.split(rows_at_once), a.split(rows_at_once), strict=True):
        squares += torch.addmm(rows.float(), a_rows, b).square().sum(0)
    return squares
