"""What adapters change in the embedding and in the LM head, slot by slot.

Owns that memory. Few adapters change either, so nothing is reserved: A and B of the heads are allocated when the first
adapter with some is loaded, whole weights one by one. Both are computed outside CUDA graphs, for the rows that have
such adapters alone; their embeddings go into a decode step's graph through a buffer.

Where a model's embedding and LM head are one weight, each is changed only where the adapter names it, as in PEFT's
model before it is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from raydata_llm.engine.adapter import EMBEDDING, HEAD, Adapter, ModuleChange
from raydata_llm.engine.adapter_linear import LinearAdapters, column_squares, row_squares
from raydata_llm.engine.adapter_tiles import AdaptedRows
from raydata_llm.engine.batch import OwnEmbeddings
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.shard import ModelShard
from raydata_llm.engine.token_lookup import lookup


@dataclass(frozen=True)
class _Embedding:
    """An adapter's embedding, this rank's part: gain * (weight + a b).

    Args:
        weight: [tokens, hidden]; the model's, or the adapter's own.
        pair: a [tokens, R] and b [R, hidden], scaled, if there are some.
        gain: [hidden], or None for 1.
    """

    weight: torch.Tensor
    pair: tuple[torch.Tensor, torch.Tensor] | None = None
    gain: torch.Tensor | None = None

    def __call__(self, token_ids: torch.Tensor, shard: ModelShard) -> torch.Tensor:
        found = lookup(self.weight, token_ids, shard)
        if self.pair is None:
            return found
        a, b = self.pair
        total = found.float() + lookup(a, token_ids, shard).float() @ b.float()
        return (total if self.gain is None else total * self.gain).to(found.dtype)


class AdapterVocabulary:
    """See the module's docstring.

    Args:
        shard, parameters, parallel, max_rank: As of `AdapterSlots`.
    """

    def __init__(
        self,
        shard: ModelShard,
        parameters: Mapping[str, torch.Tensor],
        parallel: ParallelState,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
    ) -> None:
        self._shard, self._parameters, self._parallel = shard, parameters, parallel
        self._num_slots, self._max_rank = num_slots, max_rank
        self._dtype, self._device = dtype, parallel.device
        self._embeddings: dict[int, _Embedding] = {}
        self._head_weights: dict[int, torch.Tensor] = {}
        self._heads: LinearAdapters | None = None
        # Slots that have A and B in `_heads`.
        self._paired: set[int] = set()

    def load(self, slot: int, adapter: Adapter) -> None:
        """Copy what the adapter changes into a slot, and forget what was there."""
        self._embeddings.pop(slot, None)
        self._head_weights.pop(slot, None)
        if slot in self._paired and self._heads is not None:
            self._heads.clear(slot)
            self._paired.remove(slot)
        embedding, head = adapter.changes.get(EMBEDDING), adapter.changes.get(HEAD)
        if embedding is not None and self._shard.place.is_first:
            self._load_embedding(slot, embedding)
        if head is not None and self._shard.place.is_last:
            self._load_head(slot, head)

    def changes_embeddings(self, rows: AdaptedRows) -> bool:
        """Whether one of the rows has an embedding of its own."""
        return not self._embeddings.keys().isdisjoint(rows.ranges)

    def changes_logits(self, rows: AdaptedRows) -> bool:
        """Whether one of the rows has an LM head of its own."""
        return not self._head_weights.keys().isdisjoint(rows.ranges) or not self._paired.isdisjoint(rows.ranges)

    def own_embeddings(self, token_ids: torch.Tensor, rows: AdaptedRows) -> OwnEmbeddings | None:
        """What takes the place of the model's embeddings of a step's tokens; None for none.

        Args:
            token_ids: [T].
        """
        if not self.changes_embeddings(rows):
            return None
        values = torch.zeros((len(token_ids), self._shard.model.hidden_size), dtype=self._dtype, device=self._device)
        own = OwnEmbeddings(torch.zeros((len(token_ids), 1), dtype=torch.bool, device=self._device), values)
        self.mark(own.present, rows)
        self.embed(values, token_ids, rows)
        return own

    def mark(self, present: torch.Tensor, rows: AdaptedRows) -> None:
        """Set `present` where a row has an embedding of its own."""
        present.zero_()
        for slot in self._embeddings.keys() & rows.ranges.keys():
            present[rows.of(slot)] = True

    def embed(self, values: torch.Tensor, token_ids: torch.Tensor, rows: AdaptedRows) -> None:
        """Write the rows' own embeddings to `values`, [T, hidden]."""
        for slot in self._embeddings.keys() & rows.ranges.keys():
            members = rows.of(slot)
            values[members] = self._embeddings[slot](token_ids[members], self._shard)

    def change_logits(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        rows: AdaptedRows,
        linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """Make the rows' logits those of their own heads, in place.

        Args:
            logits: [N, tokens of this rank] by the model's head.
            hidden: [N, hidden].
            linear: Multiplies by a weight.
        """
        if self._heads is not None and not self._paired.isdisjoint(rows.ranges):
            self._heads.add(logits, hidden, rows.tiles)
        for slot in self._head_weights.keys() & rows.ranges.keys():
            members = rows.of(slot)
            logits[members] = linear(hidden[members], self._head_weights[slot])

    def _load_embedding(self, slot: int, change: ModuleChange) -> None:
        weight, pair, gain = self._own_weight(EMBEDDING, change), None, None
        base = self._parameters[f"{EMBEDDING}.weight"] if weight is None else weight
        if change.a is not None and change.b is not None:
            a, b = self._of_rank(change.a.t()), change.b.t().to(self._device)
            if change.magnitude is not None:
                squares = self._parallel.all_reduce(column_squares(base, a, b))
                gain = change.magnitude.to(self._device) / squares.sqrt()
            pair = a.to(self._dtype), b.to(self._dtype)
        if weight is not None or pair is not None:
            self._embeddings[slot] = _Embedding(base, pair, gain)

    def _load_head(self, slot: int, change: ModuleChange) -> None:
        weight = self._own_weight(HEAD, change)
        if change.a is None or change.b is None:
            if weight is not None:
                self._head_weights[slot] = weight
            return
        a, b = change.a.to(self._device), self._of_rank(change.b)
        gain = None
        if change.magnitude is not None:
            squares = row_squares(self._base_head() if weight is None else weight, a, b)
            gain = self._of_rank(change.magnitude) / squares.sqrt()
        if weight is not None:
            whole = torch.addmm(weight.float(), b, a)
            self._head_weights[slot] = (whole if gain is None else whole * gain[:, None]).to(self._dtype)
            return
        if self._heads is None:
            affine = torch.zeros(self._num_slots, dtype=torch.int32, device=self._device)
            inputs, outputs = self._shard.model.hidden_size, len(self._shard.tokens)
            self._heads = LinearAdapters.allocate(
                self._num_slots, inputs, (outputs,), self._max_rank, self._dtype, affine
            )
        self._heads.a[slot, : len(a)] = a
        self._heads.b[slot, :, : len(a)] = b
        self._heads.affine.slots[slot].fill_(int(gain is not None))
        if gain is not None:
            self._heads.affine.gain[slot] = gain
        self._paired.add(slot)

    def _own_weight(self, module: str, change: ModuleChange) -> torch.Tensor | None:
        """The weight that the adapter brings along, if it is another than the model's."""
        if change.weight is None:
            return None
        weight = self._of_rank(change.weight).to(self._dtype)
        base = self._parameters[f"{EMBEDDING}.weight"] if module == EMBEDDING else self._base_head()
        return None if torch.equal(weight, base) else weight

    def _base_head(self) -> torch.Tensor:
        tied = self._shard.model.tie_word_embeddings
        return self._parameters[f"{EMBEDDING if tied else HEAD}.weight"]

    def _of_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's share of the vocabulary, on the device."""
        if self._shard.place.tp_size > 1:
            tensor = tensor[self._shard.tokens.start : self._shard.tokens.stop]
        return tensor.to(self._device)
