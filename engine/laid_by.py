"""Weights that wait on the host while their engine sleeps.

Owns the copies, pinned where they came from a GPU so that they return at the bus's speed. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LaidBy:
    """Tensors by name, on the host."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> LaidBy:
        """Move tensors to the host; `tensors` is emptied, so that each is freed once it is copied.

        On a CPU they stay where they are.
        """
        kept: dict[str, torch.Tensor] = {}
        while tensors:
            name, tensor = tensors.popitem()
            # Waits for each copy: what it is copied from may be freed, and used again, the next moment.
            kept[name] = _pinned(tensor) if tensor.is_cuda else tensor
        return cls(kept)

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Copies on the device; on a CPU the tensors themselves."""
        there = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        if device.type == "cuda":
            # The pinned memory must outlive the copies.
            torch.cuda.synchronize(device)
        return there


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
