"""The k largest values of each row, of equal ones the first: a choice with no freedom left.

`torch.topk` takes one of several ways by the number of rows, and they differ in which of equal values they return;
logits of 16 bits have many. Here a value and its place make one integer, and no two are equal:

    key = order(value) * 2^32 + (columns - 1 - place)      order: the int32 that orders as the float32 does

Shapes: values [rows, columns]; out [rows, k] twice.
"""

from __future__ import annotations

import torch

# Keys at once: 128 MiB of them.
_KEYS_AT_ONCE = 1 << 24


def invariant_topk_ref(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The equation, by a stable sort."""
    ordered = values.sort(dim=-1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def invariant_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values, largest first, and their places."""
    if not k or not len(values):
        return values[:, :k], torch.empty((len(values), k), dtype=torch.int64, device=values.device)
    rows_at_once = max(1, _KEYS_AT_ONCE // values.shape[1])
    places = torch.cat([_places(rows, k) for rows in values.split(rows_at_once)])
    return values.gather(1, places), places


def _places(values: torch.Tensor, k: int) -> torch.Tensor:
    last = values.shape[1] - 1
    # Adding 0 makes -0 a 0.
    bits = (values.float() + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys |= torch.arange(last, -1, -1, device=values.device)
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
