"""The adapters' memory on the device: for each fused linear of a rank, A and B of every slot.

Owns the copies into it. A rank holds its part: B's rows where a linear is split by output, A's columns where it is
split by input, so that the ranks' sums come out right.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from raydata_llm.engine.adapter import FUSED_PARTS, Adapter, read_adapter
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.shard import Cut, ModelShard
from raydata_llm.kernels.lora import AdapterTiles, add_lora

# Adapters that are kept on the host once read.
_KEPT = 32
# When each folder's adapter was written, as last read.
_stamps: dict[str, int] = {}


@lru_cache(maxsize=_KEPT)
def adapter_of(path: str, stamp: int, config: ModelConfig, max_rank: int) -> Adapter:
    """A folder's adapter; `stamp` is when it was written, so that a new one under an old name is read."""
    return read_adapter(Path(path), config, max_rank=max_rank)


def adapter_stamp(path: str) -> int:
    """When a folder's adapter was written; 0 if there is none."""
    settings = Path(path) / "adapter_config.json"
    return settings.stat().st_mtime_ns if settings.is_file() else 0


def load_adapter(path: str, config: ModelConfig, max_rank: int) -> Adapter:
    """Read a folder's adapter, once a process.

    Raises:
        ValueError: for what is no adapter of this model.
    """
    stamp = adapter_stamp(path)
    adapter = adapter_of(path, stamp, config, max_rank)
    _stamps[path] = stamp
    return adapter


def kept_adapter(path: str, config: ModelConfig, max_rank: int) -> Adapter:
    """As `load_adapter`; if the folder has vanished since a request with it was accepted, as it was read then."""
    if path in _stamps and not adapter_stamp(path):
        return adapter_of(path, _stamps[path], config, max_rank)
    return load_adapter(path, config, max_rank)


class LinearAdapters:
    """One fused linear's part of all slots: A [slots, parts * R, in], B [slots, out, R]."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, parts: tuple[int, ...]) -> None:
        self.a, self.b, self.parts = a, b, parts

    def add(self, y: torch.Tensor, x: torch.Tensor, tiles: AdapterTiles) -> torch.Tensor:
        """The linear's output y with the adapters' additions, in place; x is its input."""
        add_lora(y, x, self.a, self.b, tiles, self.parts)
        return y


class AdapterSlots:
    """See the module's docstring.

    Args:
        shard: The rank's part of the model.
        num_slots: Adapters on the device at once.
        max_rank: R.
    """

    def __init__(
        self, shard: ModelShard, num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self._shard, self._max_rank = shard, max_rank
        self._device = device
        self.layers = [{fused: self._allocate(layer, fused, dtype) for fused in FUSED_PARTS} for layer in shard.layers]

    def _allocate(self, layer: int, fused: str, dtype: torch.dtype) -> LinearAdapters:
        shapes = [self._shard.shapes[f"model.layers.{layer}.{part}.weight"] for part in FUSED_PARTS[fused]]
        outputs = tuple(shape[0] for shape in shapes)
        a = torch.zeros((self.num_slots, len(shapes) * self._max_rank, shapes[0][1]), dtype=dtype, device=self._device)
        b = torch.zeros((self.num_slots, sum(outputs), self._max_rank), dtype=dtype, device=self._device)
        return LinearAdapters(a, b, outputs)

    def load(self, slot: int, path: str) -> None:
        """Copy an adapter into a slot; steps launched before still see the one that was there."""
        adapter = kept_adapter(path, self._shard.model, self._max_rank)
        for layer, linears in zip(self._shard.layers, self.layers, strict=True):
            for fused, there in linears.items():
                there.a[slot].zero_()
                there.b[slot].zero_()
                if fused in adapter.layers[layer]:
                    self._copy(there, slot, layer, fused, adapter)

    def _copy(self, there: LinearAdapters, slot: int, layer: int, fused: str, adapter: Adapter) -> None:
        a, b = adapter.layers[layer][fused]
        rank, here, whole = adapter.rank, 0, 0
        for number, part in enumerate(FUSED_PARTS[fused]):
            name = f"model.layers.{layer}.{part}.weight"
            cut = self._shard.parameters[name]
            outputs = self._shard.model.parameter_shapes()[name][0]
            a_part = _cut(a[number * rank : (number + 1) * rank], cut, dim=1)
            b_part = _cut(b[whole : whole + outputs], cut, dim=0)
            there.a[slot, number * self._max_rank : number * self._max_rank + rank] = a_part.to(self._device)
            there.b[slot, here : here + len(b_part), :rank] = b_part.to(self._device)
            here, whole = here + len(b_part), whole + outputs


def _cut(tensor: torch.Tensor, cut: Cut | None, *, dim: int) -> torch.Tensor:
    # A weight [out, in] cut by outputs (dim 0) cuts B's rows (0), one cut by inputs (1) cuts A's columns (1).
    return tensor if cut is None or cut.dim != dim else tensor.narrow(dim, cut.start, cut.stop - cut.start)
