"""The one decoder that all model families are specs of: weights, and the forward pass of a step.

Owns the order of operations of a Llama-like decoder; what families differ in are flags of `ModelConfig`. Knows no
requests and no scheduling: it turns a forward batch and a KV cache into hidden states, and those into logits.

Shapes: T tokens, N sampled rows, H heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raydata_llm.engine.adapter_slots import AdapterSlots
from raydata_llm.engine.adapter_tiles import AdaptedRows
from raydata_llm.engine.batch import AttentionRows, DecodeRows, ForwardBatch, OwnEmbeddings, PrefillRows
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.parallel import ParallelState, alone
from raydata_llm.engine.rope import rope_table
from raydata_llm.engine.shard import ModelShard
from raydata_llm.engine.token_lookup import lookup
from raydata_llm.kernels.invariant_attention import invariant_attention
from raydata_llm.kernels.invariant_linear import invariant_linear
from raydata_llm.kernels.linear import linear
from raydata_llm.kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from raydata_llm.kernels.qkv_to_cache import qkv_to_cache
from raydata_llm.kernels.rms_norm import add_rms_norm, rms_norm
from raydata_llm.kernels.swiglu import swiglu


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all blocks, a pair a layer: [blocks, K, block_size, D]."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Reserve the memory; blocks are written before they are read, so it is not cleared."""
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        return cls(
            [
                (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
                for _ in range(config.num_layers)
            ]
        )


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b; weight [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    op: Callable[..., torch.Tensor] = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last dimension."""
        return self.op(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Adapted:
    """A layer's modules as the rows' adapters change them."""

    adapters: AdapterSlots | None
    rows: AdaptedRows | None
    layer: int = 0

    def __call__(self, name: str, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        if self.adapters is None or self.rows is None:
            return y
        return self.adapters.change_linear(self.layer, name, y, x, self.rows, linear.op)

    def norm(self, name: str, x: torch.Tensor, residual: torch.Tensor, eps: float) -> torch.Tensor:
        """The normed x; `residual` is what was normed."""
        if self.adapters is None or self.rows is None or not self.rows.ranges:
            return x
        return self.adapters.change_norm(self.layer, name, x, residual, self.rows, eps)

    def of(self, layer: int) -> _Adapted:
        """The same of another layer."""
        return dataclasses.replace(self, layer=layer)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; q, k and v stand in one linear, gate and up in another."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class Decoder:
    """A loaded model.

    Args:
        config: The model.
        weights: Every parameter that this rank holds once, by Hugging Face's names.
        max_model_len: Positions that occur.
        parallel: The other ranks, if there are some; this one then computes its shard.
        batch_invariant: Compute a token by the same instructions whatever the step's other tokens are.
        max_loras, max_lora_rank: Room for adapters.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        parallel: ParallelState | None = None,
        batch_invariant: bool = False,
        max_loras: int = 0,
        max_lora_rank: int = 16,
    ) -> None:
        self.parallel = parallel or alone(device)
        self.shard = ModelShard(config, self.parallel.place)
        self.config = self.shard.config
        self.dtype = dtype
        self.device = device
        self.batch_invariant = batch_invariant
        self._scale = config.head_dim**-0.5
        self._rope_table = rope_table(config.rope, config.head_dim, max_model_len, device)
        self._max_loras, self._max_lora_rank = max_loras, max_lora_rank
        self._parameters: dict[str, torch.Tensor] = {}
        self.layers: list[Layer] = []
        self.adapters: AdapterSlots | None = None
        self.fill(weights)

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Its weights by name, q, k and v and gate and up fused."""
        return self._parameters

    def fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take in every parameter that this rank holds once, by Hugging Face's names."""
        self.load(_FusedParameters(self.shard, self.dtype, self.device).fill(weights))

    def unload(self) -> dict[str, torch.Tensor]:
        """Give up weights and adapters; returns what `load` takes back. Who has captured graphs of them drops these."""
        parameters, self._parameters = self._parameters, {}
        self._embedding = self._norm = torch.empty(0, device=self.device)
        self._lm_head = Linear(self._embedding)
        self.layers, self.adapters = [], None
        return parameters

    def load(self, parameters: dict[str, torch.Tensor]) -> None:
        """Take weights, fused and on the device, and make room for adapters."""
        self._parameters, take = parameters, parameters.get
        if self._max_loras:
            self.adapters = AdapterSlots(
                self.shard,
                parameters,
                self.parallel,
                num_slots=self._max_loras,
                max_rank=self._max_lora_rank,
                dtype=self.dtype,
            )
        # A stage in the middle has neither; nor is it asked for them.
        nothing = torch.empty(0, device=self.device)
        self._embedding = parameters.get("model.embed_tokens.weight", nothing)
        self._norm = parameters.get("model.norm.weight", nothing)
        op = invariant_linear if self.batch_invariant else linear

        def fused(name: str) -> Linear:
            return Linear(parameters[f"{name}.weight"], take(f"{name}.bias"), op)

        self._lm_head = Linear(parameters.get("lm_head.weight", self._embedding), op=op)
        self.layers = []
        for index, window in zip(self.shard.layers, self.config.sliding_windows, strict=True):
            name = f"model.layers.{index}"
            attn, mlp = f"{name}.self_attn", f"{name}.mlp"
            self.layers.append(
                Layer(
                    input_norm=parameters[f"{name}.input_layernorm.weight"],
                    qkv=fused(f"{attn}.qkv_proj"),
                    q_norm=take(f"{attn}.q_norm.weight"),
                    k_norm=take(f"{attn}.k_norm.weight"),
                    o=fused(f"{attn}.o_proj"),
                    post_norm=parameters[f"{name}.post_attention_layernorm.weight"],
                    gate_up=fused(f"{mlp}.gate_up_proj"),
                    down=fused(f"{mlp}.down_proj"),
                    window=window,
                )
            )

    def forward(self, batch: ForwardBatch, kv_cache: KVCache, incoming: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step's tokens, write their KV, and return the hidden states to sample from: [N, hidden].

        Of a stage that is not the last, what the next one takes as `incoming`: [T, hidden].

        Args:
            incoming: [T, hidden] of the stage before; it may be changed.
        """
        eps, place = self.config.rms_norm_eps, self.parallel.place
        residual = self._embed(batch.token_ids, batch.own_embeddings) if incoming is None else incoming
        if batch.embedded is not None:
            residual.index_copy_(0, batch.embedded.tokens, batch.embedded.values)
        adapted = _Adapted(self.adapters, batch.adapters)
        x = rms_norm(residual, self.layers[0].input_norm, eps)
        x = adapted.norm("input_layernorm", x, residual, eps)
        for index, layer in enumerate(self.layers):
            cache, is_last = kv_cache.layers[index], index + 1 == len(self.layers)
            adapted = adapted.of(index)
            q = self._write_kv(x, layer, batch, cache, adapted)
            if is_last and place.is_last and batch.sampled is not None:
                # The others' KV is written, and nothing more is asked of them.
                q, residual = q[batch.sampled.tokens], residual[batch.sampled.tokens]
                if not len(q):
                    return residual
                attended = self._decode_attention(q, layer, batch.block_table, batch.sampled, cache)
                adapted = dataclasses.replace(adapted, rows=batch.sampled_adapters)
            else:
                attended = self._attention(q, layer, batch, cache)
            x = self.parallel.all_reduce(adapted("self_attn.o_proj", layer.o, attended.flatten(1)))
            x, residual = add_rms_norm(x, residual, layer.post_norm, eps)
            x = adapted.norm("post_attention_layernorm", x, residual, eps)
            x = swiglu(adapted("mlp.gate_up_proj", layer.gate_up, x))
            x = self.parallel.all_reduce(adapted("mlp.down_proj", layer.down, x))
            if is_last and not place.is_last:
                return x + residual
            next_norm = self._norm if is_last else self.layers[index + 1].input_norm
            x, residual = add_rms_norm(x, residual, next_norm, eps)
            x = adapted.of(index + 1).norm("input_layernorm", x, residual, eps)
        return x

    def logits(self, hidden: torch.Tensor, adapted: AdaptedRows | None = None) -> torch.Tensor:
        """Scores over the vocabulary, in the model's dtype: [N, vocab_size].

        Args:
            hidden: [N, hidden].
            adapted: The rows that have an adapter, if some have.
        """
        return self.whole_logits(self.part_logits(hidden, adapted))

    def part_logits(self, hidden: torch.Tensor, adapted: AdaptedRows | None = None) -> torch.Tensor:
        """As `logits`, over this rank's share of the vocabulary: [N, len(shard.tokens)]."""
        logits = self._lm_head(hidden)
        if adapted is not None and self.adapters is not None:
            self.adapters.vocabulary.change_logits(logits, hidden, adapted, self._lm_head.op)
        return logits

    def whole_logits(self, part: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary from all ranks' parts."""
        if self.parallel.place.tp_size == 1:
            return part
        # The last rank's share may be smaller.
        padded = F.pad(part, (0, self.shard.tokens_per_rank - part.shape[1]))
        gathered = self.parallel.all_gather(padded).movedim(0, 1)
        return gathered.flatten(1)[:, : self.config.vocab_size].contiguous()

    def _embed(self, token_ids: torch.Tensor, own: OwnEmbeddings | None) -> torch.Tensor:
        found = lookup(self._embedding, token_ids, self.shard)
        if own is not None:
            found = torch.where(own.present, own.values, found)
        return self.parallel.all_reduce(found)

    def _write_kv(
        self,
        x: torch.Tensor,
        layer: Layer,
        batch: ForwardBatch,
        cache: tuple[torch.Tensor, torch.Tensor],
        adapted: _Adapted,
    ) -> torch.Tensor:
        """The layer's queries, [T, H, D]; keys and values go to the cache."""
        return qkv_to_cache(
            adapted("self_attn.qkv_proj", layer.qkv, x),
            batch.positions,
            batch.slot_mapping,
            self._rope_table,
            *cache,
            layer.q_norm,
            layer.k_norm,
            self.config.rms_norm_eps,
        )

    def _attention(
        self, q: torch.Tensor, layer: Layer, batch: ForwardBatch, cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        num_decodes = 0 if batch.decode is None else len(batch.decode.slots)
        if batch.decode is not None:
            self._decode_attention(q[:num_decodes], layer, batch.block_table, batch.decode, cache, out[:num_decodes])
        if batch.prefill is not None:
            self._prefill_attention(q[num_decodes:], layer, batch.block_table, batch.prefill, cache, out[num_decodes:])
        return out

    def _decode_attention(
        self,
        q: torch.Tensor,
        layer: Layer,
        block_table: torch.Tensor,
        rows: DecodeRows,
        cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.batch_invariant:
            return self._invariant_attention(q, layer, block_table, rows, None, cache, out)
        return paged_decode_attention(
            q,
            *cache,
            block_table,
            rows.context_lens,
            self._scale,
            layer.window,
            table_rows=rows.slots,
            # A window soon leaves the prefix behind: such layers read their rows one by one.
            shared=rows.shared if layer.window is None else None,
            out=out,
        )

    def _prefill_attention(
        self,
        q: torch.Tensor,
        layer: Layer,
        block_table: torch.Tensor,
        rows: PrefillRows,
        cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
    ) -> torch.Tensor:
        if self.batch_invariant:
            return self._invariant_attention(q, layer, block_table, rows, rows.query_starts, cache, out)
        return paged_prefill_attention(
            q,
            *cache,
            block_table,
            rows.context_lens,
            rows.query_starts,
            self._scale,
            layer.window,
            table_rows=rows.slots,
            longest=rows.longest,
            out=out,
        )

    def _invariant_attention(
        self,
        q: torch.Tensor,
        layer: Layer,
        block_table: torch.Tensor,
        rows: AttentionRows,
        query_starts: torch.Tensor | None,
        cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return invariant_attention(
            q,
            *cache,
            block_table,
            rows.context_lens,
            query_starts,
            self._scale,
            layer.window,
            table_rows=rows.slots,
            out=out,
        )


_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class _FusedParameters:
    """Places checkpoint parameters where the decoder wants them: q, k, v and gate, up side by side.

    Weights are copied into their final place as they come, so loading holds one copy of the model plus one tensor.
    """

    def __init__(self, shard: ModelShard, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._shapes = shard.shapes
        self._places: dict[str, tuple[str, int]] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            fused = self._fused_name(name)
            offset = self._sizes.get(fused, (0,))[0]
            self._places[name] = (fused, offset)
            self._sizes[fused] = (offset + shape[0], *shape[1:])

    def fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Take in every parameter once; returns the fused ones by name."""
        parameters: dict[str, torch.Tensor] = {}
        missing = set(self._places)
        for name, tensor in weights:
            fused, offset = self._places[name]
            missing.remove(name)
            if fused == name:
                # On a CPU it may be a view of the checkpoint's file, which would be read again under memory pressure.
                parameters[name] = tensor.clone() if tensor.device.type == "cpu" else tensor
                continue
            if fused not in parameters:
                parameters[fused] = torch.empty(self._sizes[fused], dtype=self._dtype, device=self._device)
            parameters[fused][offset : offset + tensor.shape[0]] = tensor
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} parameter(s), {sorted(missing)[0]} among them")
        return parameters

    def _fused_name(self, name: str) -> str:
        head, _, kind = name.rpartition(".")
        module, _, projection = head.rpartition(".")
        return f"{module}.{_FUSED[projection]}.{kind}" if projection in _FUSED else name
