"""The adapters' memory on the device: for each fused linear of a rank, A and B of every slot, with gains and shifts.

Owns the copies into it. A rank holds its part: B's rows where a linear is split by output, A's columns where it is
split by input, so that the ranks' sums come out right; of sums the first rank adds the shift. What adapters change in
the embedding and the LM head is in `adapter_vocabulary.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from raydata_llm.engine.adapter import FUSED_PARTS, Adapter, ModuleChange
from raydata_llm.engine.adapter_cache import kept_adapter
from raydata_llm.engine.adapter_linear import LinearAdapters, row_squares
from raydata_llm.engine.adapter_tiles import AdaptedRows
from raydata_llm.engine.adapter_vocabulary import AdapterVocabulary
from raydata_llm.engine.adapter_whole import WholeModules
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.shard import Cut, ModelShard
from raydata_llm.engine.weights import take_part


class AdapterSlots:
    """See the module's docstring.

    Args:
        shard: The rank's part of the model.
        parameters: The rank's weights, fused, by name; what DoRA measures.
        parallel: The other ranks; all load the same adapters in the same order.
        num_slots: Adapters on the device at once.
        max_rank: R.
    """

    def __init__(
        self,
        shard: ModelShard,
        parameters: Mapping[str, torch.Tensor],
        parallel: ParallelState,
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_slots = num_slots
        self._shard, self._parameters, self._parallel = shard, parameters, parallel
        self._max_rank = max_rank
        self._device = parallel.device
        self._affine = torch.zeros(num_slots, dtype=torch.int32, device=self._device)
        self.layers = [{fused: self._allocate(layer, fused, dtype) for fused in FUSED_PARTS} for layer in shard.layers]
        self.whole = WholeModules(shard, parameters, dtype, self._device)
        self.vocabulary = AdapterVocabulary(shard, parameters, parallel, num_slots, max_rank, dtype)

    def _allocate(self, layer: int, fused: str, dtype: torch.dtype) -> LinearAdapters:
        shapes = [self._shard.shapes[f"model.layers.{layer}.{part}.weight"] for part in FUSED_PARTS[fused]]
        parts = tuple(shape[0] for shape in shapes)
        return LinearAdapters.allocate(self.num_slots, shapes[0][1], parts, self._max_rank, dtype, self._affine)

    def load(self, slot: int, path: str) -> None:
        """Copy an adapter into a slot; steps launched before still see the one that was there.

        The device is waited for only where an adapter brings its embedding's weight along, to compare that.
        """
        adapter = kept_adapter(path, self._shard.model, self._max_rank)
        self._affine[slot].fill_(int(adapter.is_affine))
        for layer, linears in zip(self._shard.layers, self.layers, strict=True):
            for fused, there in linears.items():
                there.clear(slot)
                self._copy(there, slot, f"model.layers.{layer}", fused, adapter)
        self.whole.load(slot, adapter)
        self.vocabulary.load(slot, adapter)

    def change_linear(
        self,
        layer: int,
        fused: str,
        y: torch.Tensor,
        x: torch.Tensor,
        rows: AdaptedRows,
        linear: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """A linear's output y by the rows' adapters, in place; x is its input.

        Args:
            layer: Of the rank's, from 0 on.
        """
        self.layers[layer][fused].add(y, x, rows.tiles)
        return self.whole.change_linear(f"model.layers.{self._shard.layers[layer]}.{fused}", y, x, rows, linear)

    def change_norm(
        self, layer: int, norm: str, x: torch.Tensor, residual: torch.Tensor, rows: AdaptedRows, eps: float
    ) -> torch.Tensor:
        """A norm's output x by the rows' adapters, in place; `residual` is what was normed.

        Args:
            layer: Of the rank's, from 0 on; past the last for the model's own norm.
        """
        is_own = layer == len(self._shard.layers)
        name = "model.norm" if is_own else f"model.layers.{self._shard.layers[layer]}.{norm}"
        return self.whole.change_norm(name, x, residual, rows, eps)

    def _copy(self, there: LinearAdapters, slot: int, layer: str, fused: str, adapter: Adapter) -> None:
        here = 0
        for number, (part, outputs) in enumerate(zip(FUSED_PARTS[fused], there.parts, strict=True)):
            change = adapter.changes.get(f"{layer}.{part}")
            if change is not None:
                cut = self._shard.parameters[f"{layer}.{part}.weight"]
                rows = slice(here, here + outputs)
                pair = None
                if change.a is not None and change.b is not None:
                    rank, first = len(change.a), number * self._max_rank
                    pair = _cut(change.a, cut, dim=1).to(self._device), _cut(change.b, cut, dim=0).to(self._device)
                    there.a[slot, first : first + rank] = pair[0]
                    there.b[slot, rows, :rank] = pair[1]
                if change.is_affine:
                    self._set_affine(there, slot, rows, f"{layer}.{fused}", change, cut, pair)
            here += outputs

    def _set_affine(
        self,
        there: LinearAdapters,
        slot: int,
        rows: slice,
        fused: str,
        change: ModuleChange,
        cut: Cut | None,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        gain, shift = there.affine.gain[slot, rows], there.affine.shift[slot, rows]
        is_summed = cut is not None and cut.dim == 1
        if change.magnitude is not None and pair is not None:
            squares = row_squares(self._parameters[f"{fused}.weight"][rows], *pair)
            if is_summed:
                squares = self._parallel.all_reduce(squares)
            gain.copy_(_cut(change.magnitude, cut, dim=0).to(self._device) / squares.sqrt())
        if is_summed and self._shard.place.tp_rank:
            return
        own = self._parameters.get(f"{fused}.bias")
        if own is not None:
            bias = own[rows].float()
            wanted = bias if change.bias is None else _cut(change.bias, cut, dim=0).to(self._device)
            shift.copy_(wanted - gain * bias)
        if change.added_bias is not None:
            shift += _cut(change.added_bias, cut, dim=0).to(self._device)


def _cut(tensor: torch.Tensor, cut: Cut | None, *, dim: int) -> torch.Tensor:
    # A weight [out, in] cut by outputs (dim 0) cuts B's rows (0), one cut by inputs (1) cuts A's columns (1).
    return take_part(tensor, cut) if cut is not None and cut.dim == dim else tensor
