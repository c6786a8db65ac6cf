"""Pure decode steps on the device: their plan's buffers, and the CUDA graphs that replay them.

Owns what a decode step reads (which slots, which groups) in buffers that never move, and one graph a bucket of row
numbers, with and without prefix groups and adapters. Embeddings that adapters change are looked up before a graph is
replayed, and lie in a buffer that it reads. Knows no prefill and no sampling: a step ends in hidden states.

Invariants: a graph is captured only after the same step ran eagerly (kernels are compiled and loaded by then); rows
that pad a bucket name the padding slot, which writes to the trash block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from raydata_llm.engine.adapter_tiles import AdaptedRows, TileBuffer, ranges_of
from raydata_llm.engine.batch import DecodeRows, ForwardBatch, OwnEmbeddings
from raydata_llm.engine.decode_buckets import fixed_buckets, measured_buckets
from raydata_llm.engine.decode_plan import MAX_GROUPS, DecodePlan
from raydata_llm.engine.decoder import Decoder, KVCache
from raydata_llm.engine.graph_pool import GraphPool
from raydata_llm.engine.sequence import IntArray
from raydata_llm.kernels.decode_inputs import DecodeInputs, decode_inputs
from raydata_llm.kernels.paged_attention import SharedPrefixes


class SlotState:
    """What the device knows of each slot, and of one more that stands for none.

    Args:
        num_slots: S.
        max_blocks: Blocks of a sequence at most.
        block_size: Tokens of a block.
    """

    def __init__(self, num_slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self.last_token = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros((num_slots + 1, max_blocks), dtype=torch.int32, device=device)

    def decode_inputs(self, slots: torch.Tensor) -> DecodeInputs:
        """A decode step's inputs; advances the slots' counts."""
        return decode_inputs(slots, self.last_token, self.num_computed, self.block_table, self.block_size)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor


class DecodeStep:
    """See the module's docstring.

    Args:
        use_graphs: Replay steps from CUDA graphs.
        share_prefixes: Whether plans may have groups.
        incoming: Where the hidden states of the stage before come to lie; None on the first stage.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        state: SlotState,
        *,
        use_graphs: bool,
        share_prefixes: bool,
        incoming: torch.Tensor | None = None,
    ) -> None:
        self._incoming = incoming
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._state = state
        self._use_graphs = use_graphs
        self._share_prefixes = share_prefixes
        self._plan: DecodePlan | None = None
        self._buffer = _PlanBuffer(state.num_slots, decoder.device)
        self._graphs: dict[tuple[int, bool, bool], _Graph] = {}
        self._buckets = fixed_buckets(state.num_slots)
        # What a step of each takes, once they are measured.
        self.bucket_seconds: dict[int, float] = {}
        # The plan's rows that have an adapter; None if there are none.
        self.adapted: AdaptedRows | None = None
        self._tiles: TileBuffer | None = None
        self._own: OwnEmbeddings | None = None
        # Whether a row has an embedding of its own.
        self._has_own = False
        if decoder.adapters is not None:
            self._tiles = TileBuffer(state.num_slots, decoder.adapters.num_slots, decoder.device)
            if decoder.parallel.place.is_first:
                shape = (state.num_slots, decoder.config.hidden_size)
                self._own = OwnEmbeddings(
                    torch.zeros((state.num_slots, 1), dtype=torch.bool, device=decoder.device),
                    torch.zeros(shape, dtype=decoder.dtype, device=decoder.device),
                )
        if use_graphs:
            self._graph_pool = GraphPool(decoder.device)

    def set_plan(self, plan: DecodePlan, adapter_slots: IntArray) -> None:
        """Take the plan of the next step, and the slots of its rows' adapters (empty if no row has one)."""
        if self._plan is None or self._plan.version != plan.version:
            self._buffer.fill(plan, self._state.num_slots)
            self._plan = plan
            self.adapted = None
            if self._tiles is not None and (adapter_slots >= 0).any():
                self._tiles.fill(adapter_slots)
                self.adapted = AdaptedRows(self._tiles.tiles(len(plan.slots)), ranges_of(adapter_slots))
                self._mark_own_embeddings(self.adapted)

    def rows(self, num_rows: int, context_lens: torch.Tensor) -> DecodeRows:
        """The plan's first rows, for a step that does more than decode; those past its end share nothing."""
        assert self._plan is not None
        return self._buffer.rows(num_rows, context_lens, shared=self._plan.num_groups > 0)

    @property
    def slots(self) -> torch.Tensor:
        """[D] slots of the plan."""
        assert self._plan is not None
        slots: torch.Tensor = self._buffer.slots[: len(self._plan.slots)]
        return slots

    def run(self) -> torch.Tensor:
        """Run the plan's rows; returns their hidden states, [D, hidden], valid until the next step is launched."""
        assert self._plan is not None
        num_rows, shared = len(self._plan.slots), self._plan.num_groups > 0
        adapted = self.adapted is not None
        if self.adapted is not None and self._own is not None and self._has_own and self._decoder.adapters is not None:
            tokens = self._state.last_token[self.slots]
            self._decoder.adapters.vocabulary.embed(self._own.values, tokens, self.adapted)
        if not self._use_graphs or self._needs_eager():
            return self._forward(num_rows, shared, self.adapted)
        bucket = next(bucket for bucket in self._buckets if bucket >= num_rows)
        graph = self._graphs[bucket, shared, adapted]
        graph.graph.replay()
        return graph.hidden[:num_rows]

    def run_kernels(self) -> None:
        """Launch every kernel that a step may need, on padding."""
        self._buffer.fill(_no_rows(), self._state.num_slots)
        self._plan = None
        for bucket in (self._buckets[0], self._buckets[-1]):
            for shared, adapted in self._kinds():
                self._forward(bucket, shared, self._any_rows(bucket, adapted))

    def warm_up(self) -> None:
        """Run every kernel, and capture the graphs, largest first: the others live in its memory."""
        self.run_kernels()
        if not self._use_graphs:
            return
        if not self._decoder.batch_invariant:
            self.bucket_seconds = measured_buckets(self._decoder, self._state.num_slots)
            self._buckets = list(self.bucket_seconds)
        for bucket in reversed(self._buckets):
            for shared, adapted in self._kinds():
                forward = partial(self._forward, bucket, shared, self._any_rows(bucket, adapted))
                forward()
                self._graphs[bucket, shared, adapted] = _Graph(*self._graph_pool.capture(forward))

    def _kinds(self) -> list[tuple[bool, bool]]:
        """The kinds of steps, as (with prefix groups, with adapters)."""
        shared = (False, True) if self._share_prefixes else (False,)
        adapted = (False,) if self._tiles is None else (False, True)
        return [(one, other) for one in shared for other in adapted]

    def _any_rows(self, num_rows: int, adapted: bool) -> AdaptedRows | None:
        """The rows of a graph: those that have an adapter when it is replayed."""
        return AdaptedRows(self._tiles.tiles(num_rows), {}) if adapted and self._tiles is not None else None

    def _needs_eager(self) -> bool:
        return (
            self.adapted is not None
            and self._decoder.adapters is not None
            and self._decoder.adapters.whole.changes(self.adapted)
        )

    def _forward(self, num_rows: int, shared: bool, adapted: AdaptedRows | None) -> torch.Tensor:
        slots = self._buffer.slots[:num_rows]
        inputs = self._state.decode_inputs(slots)
        batch = ForwardBatch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            block_table=self._state.block_table,
            decode=self._buffer.rows(num_rows, inputs.context_lens, shared=shared),
            prefill=None,
            sampled=None,
            adapters=adapted,
            own_embeddings=None if adapted is None else self._own_embeddings(num_rows),
        )
        return self._decoder.forward(
            batch, self._kv_cache, None if self._incoming is None else self._incoming[:num_rows]
        )

    def _mark_own_embeddings(self, adapted: AdaptedRows) -> None:
        if self._own is None or self._decoder.adapters is None:
            return
        vocabulary, had_own = self._decoder.adapters.vocabulary, self._has_own
        self._has_own = vocabulary.changes_embeddings(adapted)
        if self._has_own or had_own:
            vocabulary.mark(self._own.present, adapted)

    def _own_embeddings(self, num_rows: int) -> OwnEmbeddings | None:
        own = self._own
        return own and OwnEmbeddings(own.present[:num_rows], own.values[:num_rows])


class _PlanBuffer:
    """A plan's arrays on the device, in one allocation, filled by one copy."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        # Each part begins at 16 bytes: Triton compiles a kernel anew for pointers that do not.
        sizes = [-(-size // 4) * 4 for size in (num_slots, num_slots, MAX_GROUPS + 1, MAX_GROUPS, MAX_GROUPS)]
        self._sizes = sizes
        self._all = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = self._all.split(sizes)
        self.slots, self._row_lens = parts[0], parts[1]
        self._starts, self._lens, self._slots_of_groups = parts[2][: MAX_GROUPS + 1], parts[3], parts[4]

    def fill(self, plan: DecodePlan, padding_slot: int) -> None:
        """Take a plan; its rows beyond are padding."""
        num_grouped = plan.group_starts[-1]
        leaders = plan.slots[plan.group_starts[:-1]]
        fills = (
            (plan.slots, padding_slot),
            (plan.row_lens, 0),
            (plan.group_starts, num_grouped),
            (plan.group_lens, 0),
            (leaders, padding_slot),
        )
        padded = [
            np.concatenate([values, np.full(size - len(values), rest)])
            for (values, rest), size in zip(fills, self._sizes, strict=True)
        ]
        host = torch.from_numpy(np.concatenate(padded).astype(np.int32))
        self._all.copy_(host.pin_memory() if self._all.is_cuda else host, non_blocking=True)

    def rows(self, num_rows: int, context_lens: torch.Tensor, *, shared: bool) -> DecodeRows:
        """The first rows."""
        groups = SharedPrefixes(
            starts=self._starts, lens=self._lens, table_rows=self._slots_of_groups, row_lens=self._row_lens[:num_rows]
        )
        return DecodeRows(slots=self.slots[:num_rows], context_lens=context_lens, shared=groups if shared else None)


def _no_rows() -> DecodePlan:
    none = np.zeros(0, dtype=np.int32)
    return DecodePlan(version=-1, slots=none, group_starts=np.zeros(1, dtype=np.int32), group_lens=none)
