"""Whole weights that adapters bring along for modules of a layer: linears, and norms of the hidden states.

Owns that memory; nothing is reserved for it. Few adapters have such weights, so they are computed row by row of a
slot, outside CUDA graphs: a decode step with such a row runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from raydata_llm.engine.adapter import FUSED_PARTS, Adapter, ModuleChange, is_norm
from raydata_llm.engine.adapter_tiles import AdaptedRows
from raydata_llm.engine.shard import ModelShard
from raydata_llm.engine.weights import take_part
from raydata_llm.kernels.rms_norm import rms_norm

_Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class _Part:
    """A part of a fused linear, of this rank: its outputs' place, weight and bias."""

    outputs: slice
    weight: torch.Tensor
    bias: torch.Tensor | None


class WholeModules:
    """See the module's docstring.

    Args:
        shard, parameters: As of `AdapterSlots`.
    """

    def __init__(
        self,
        shard: ModelShard,
        parameters: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shard, self._parameters = shard, parameters
        self._dtype, self._device = dtype, device
        # By slot, then by module; a linear's by the fused one's name.
        self._parts: dict[int, dict[str, list[_Part]]] = {}
        self._norms: dict[int, dict[str, torch.Tensor]] = {}

    def load(self, slot: int, adapter: Adapter) -> None:
        """Copy what the adapter brings along into a slot, and forget what was there."""
        self._parts.pop(slot, None)
        self._norms.pop(slot, None)
        norms = {
            name: change.weight.to(self._device, self._dtype)
            for name, change in adapter.changes.items()
            if change.weight is not None and is_norm(name) and f"{name}.weight" in self._shard.parameters
        }
        parts: dict[str, list[_Part]] = {}
        for layer in self._shard.layers:
            for fused in FUSED_PARTS:
                if found := list(self._parts_of(f"model.layers.{layer}", fused, adapter)):
                    parts[f"model.layers.{layer}.{fused}"] = found
        if norms:
            self._norms[slot] = norms
        if parts:
            self._parts[slot] = parts

    def changes(self, rows: AdaptedRows) -> bool:
        """Whether one of the rows has such a weight."""
        return not (self._parts.keys() | self._norms.keys()).isdisjoint(rows.ranges)

    def change_linear(
        self, name: str, y: torch.Tensor, x: torch.Tensor, rows: AdaptedRows, linear: _Linear
    ) -> torch.Tensor:
        """The linear's output y, of the rows with another weight by that, in place; x is its input."""
        for slot in self._parts.keys() & rows.ranges.keys():
            for part in self._parts[slot].get(name, ()):
                members = rows.of(slot)
                y[members, part.outputs] = linear(x[members], part.weight, part.bias)
        return y

    def change_norm(
        self, name: str, x: torch.Tensor, residual: torch.Tensor, rows: AdaptedRows, eps: float
    ) -> torch.Tensor:
        """The normed x, of the rows with another weight by that, in place; `residual` is what was normed."""
        for slot in self._norms.keys() & rows.ranges.keys():
            if name in self._norms[slot]:
                members = rows.of(slot)
                x[members] = rms_norm(residual[members], self._norms[slot][name], eps)
        return x

    def _parts_of(self, layer: str, fused: str, adapter: Adapter) -> Iterable[_Part]:
        first = 0
        for part in FUSED_PARTS[fused]:
            outputs = slice(first, first + self._shard.shapes[f"{layer}.{part}.weight"][0])
            change = adapter.changes.get(f"{layer}.{part}")
            if change is not None and change.weight is not None:
                cut = self._shard.parameters[f"{layer}.{part}.weight"]
                weight = take_part(change.weight, cut).to(self._device, self._dtype).contiguous()
                yield _Part(outputs, weight, self._bias(f"{layer}.{part}", f"{layer}.{fused}", outputs, change))
            first = outputs.stop

    def _bias(self, module: str, fused: str, outputs: slice, change: ModuleChange) -> torch.Tensor | None:
        own = self._parameters.get(f"{fused}.bias")
        if own is None:
            return None
        if change.bias is None:
            return own[outputs]
        return take_part(change.bias, self._shard.parameters[f"{module}.bias"]).to(self._device, self._dtype)
