"""Runs scheduled batches on the device.

Owns the device's state: weights, KV cache, and per slot the last token, the count of computed tokens, the block table
and the sampling parameters. A step's decode inputs are made from that state, so launching a step needs no token of an
earlier one on the host; sampled tokens come back by one asynchronous copy. Steps with prefill run as they come, pure
decode steps in `decode_step.py`. Knows no requests' ends and no queue.

Shapes as in batch.py; S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.adapter_tiles import AdaptedRows, upload_rows
from raydata_llm.engine.batch import EmbeddedRows, ForwardBatch, PrefillRows, SampledRows, ScheduledBatch
from raydata_llm.engine.decode_step import DecodeStep, SlotState
from raydata_llm.engine.decoder import Decoder, KVCache
from raydata_llm.engine.device_errors import explained
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.logprobs import PromptPiece, prompt_pieces
from raydata_llm.engine.returning_tokens import ReturningTokens
from raydata_llm.engine.sampler import SampledLogprobs, Sampler
from raydata_llm.engine.sequence import IntArray
from raydata_llm.engine.step_codec import encode_result
from raydata_llm.engine.upload import to_host, upload, warm_up_pinned_memory
from raydata_llm.engine.vocab_parallel import VocabParallelSampler
from raydata_llm.kernels.tuning import SHORT_CONTEXT


class LaunchedStep:
    """A step under way; `read` is the loop's one wait for the device."""

    def __init__(
        self, tokens: torch.Tensor, logprobs: SampledLogprobs | None, prompt_pieces: list[PromptPiece]
    ) -> None:
        self._tokens = to_host(tokens)
        self._logprobs = logprobs and dataclasses.replace(logprobs, values=logprobs.values.to_host())
        self._prompt_pieces = prompt_pieces
        self._done = torch.cuda.Event() if tokens.is_cuda else None
        if self._done is not None:
            self._done.record()

    def read_encoded(self) -> bytes:
        """As `read`, for an engine in another process."""
        if self._done is not None:
            self._done.synchronize()
        return encode_result(self._tokens.numpy().astype(np.int32), self._logprobs, self._prompt_pieces)

    def read(self) -> tuple[IntArray, SampledLogprobs | None]:
        """Wait for the step; returns its sampled tokens, [N], and log-probabilities, those of prompts in place."""
        if self._done is not None:
            self._done.synchronize()
        tokens: IntArray = self._tokens.numpy().astype(np.int32)
        for piece in self._prompt_pieces:
            piece.deliver()
        return tokens, self._logprobs


class ModelRunner:
    """See the module's docstring.

    Args:
        decoder: The loaded model.
        kv_cache: Its memory of keys and values.
        num_slots: S.
        max_blocks: Blocks of a sequence at most.
        block_size: Tokens of a block.
        max_num_batched_tokens: Tokens of a step at most.
        num_penalty_rows: Rows with penalties at once at most.
        use_graphs: Replay pure decode steps from CUDA graphs.
        share_prefixes: Whether decode rows may come in groups.
        processed_logprobs: As the sampler's.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        *,
        num_slots: int,
        max_blocks: int,
        block_size: int,
        max_num_batched_tokens: int,
        num_penalty_rows: int,
        use_graphs: bool,
        share_prefixes: bool,
        processed_logprobs: bool,
    ) -> None:
        self._decoder = decoder
        self._parallel = decoder.parallel
        self._place = decoder.parallel.place
        self._kv_cache = kv_cache
        self._device = decoder.device
        self._max_num_batched_tokens = max_num_batched_tokens
        sampler = Sampler(
            num_slots,
            decoder.config.vocab_size,
            num_penalty_rows,
            decoder.dtype,
            self._device,
            batch_invariant=decoder.batch_invariant,
            processed_logprobs=processed_logprobs,
        )
        self._sampler: Sampler | VocabParallelSampler = sampler
        if self._place.tp_size > 1:
            self._sampler = VocabParallelSampler(sampler, decoder, num_slots)
        self._state = SlotState(num_slots, max_blocks, block_size, self._device)
        self._incoming: torch.Tensor | None = None
        if not self._place.is_first:
            shape = (max_num_batched_tokens, decoder.config.hidden_size)
            self._incoming = torch.zeros(shape, dtype=decoder.dtype, device=self._device)
        self._returning = ReturningTokens(self._state, self._parallel)
        self._decode = DecodeStep(
            decoder,
            kv_cache,
            self._state,
            use_graphs=use_graphs,
            share_prefixes=share_prefixes,
            incoming=self._incoming,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile or load every kernel, and capture the graphs, so that no step waits for it."""
        if self._device.type != "cuda":
            return
        from raydata_llm.kernels.rehearsal import rehearsal

        # Rows of many keys are attended to by another kernel than rows of few.
        limit = min(self._max_num_batched_tokens, self._state.block_table.shape[1] * self._state.block_size)
        longest = min(limit, SHORT_CONTEXT + 1)
        with rehearsal(self._device):
            self._decode.run_kernels()
            self._run_step(1, 1)
            self._run_step(1, longest)
            self._run_step(self._state.num_slots, self._state.num_slots)
        self._decode.warm_up()
        warm_up_pinned_memory()
        self._run_step(1, 1)
        self._run_step(1, longest)
        # A library's kernels are loaded when they are first used, while the device waits, and it has others for other
        # numbers of tokens. The largest step last: the memory it needs is there from now on.
        for num_tokens in step_sizes(self._state.num_slots, self._max_num_batched_tokens):
            self._run_step(self._state.num_slots, num_tokens)

    def _run_step(self, num_rows: int, num_tokens: int) -> None:
        """Run a prefill of padding, and draw from some rows."""
        incoming = None if self._incoming is None else self._incoming[:num_tokens]
        hidden = self._decoder.forward(self._trash_prefill(num_rows, num_tokens), self._kv_cache, incoming)
        if self._place.is_last:
            self._decoder.part_logits(hidden[:num_rows])
            self._sampler.warm_up(num_rows)

    @property
    def bucket_seconds(self) -> dict[int, float]:
        """Rows that decode steps are padded to, and the seconds of such a step; empty where nothing was measured."""
        return self._decode.bucket_seconds

    def _trash_prefill(self, least_rows: int, num_tokens: int) -> ForwardBatch:
        """A prefill of the padding slot, again and again, whose blocks are all the trash block."""
        longest = self._state.block_table.shape[1] * self._state.block_size
        num_rows = max(least_rows, -(-num_tokens // longest))
        starts = np.linspace(0, num_tokens, num_rows + 1).astype(np.int32)
        lens = np.diff(starts)
        slots, context_lens, starts_there = self._upload(np.full(num_rows, self._state.num_slots), lens, starts)
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
        return ForwardBatch(
            token_ids=zeros,
            positions=zeros,
            slot_mapping=zeros,
            block_table=self._state.block_table,
            decode=None,
            prefill=PrefillRows(
                slots=slots, context_lens=context_lens, query_starts=starts_there, longest=int(lens.max())
            ),
            sampled=SampledRows(slots=slots, context_lens=context_lens, shared=None, tokens=slots * 0),
        )

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch, bitmask: Callable[[], Bitmask | None] | None = None) -> LaunchedStep | None:
        """Start a step; steps run in launch order. None from a stage that does not sample.

        Args:
            bitmask: For a step with guided rows: called while the forward pass runs, it says what they may draw.
        """
        self._apply_updates(batch)
        self._returning.receive_for(batch)
        self._set_beams(batch)
        incoming = None if self._incoming is None else self._incoming[: batch.num_tokens]
        if incoming is not None:
            self._parallel.receive_hidden(incoming)
        pieces: list[PromptPiece] = []
        if len(batch.prefill_slots):
            slots, forward_batch, adapted = self._forward_batch(batch)
            sampled = forward_batch.sampled
            if batch.prompt_logprob_chunks and sampled is not None and self._place.is_last:
                whole = dataclasses.replace(forward_batch, sampled=None)
                hidden = self._decoder.forward(whole, self._kv_cache, incoming)
                pieces = prompt_pieces(self._decoder, hidden, batch)
                hidden = hidden[sampled.tokens]
            else:
                hidden = self._decoder.forward(forward_batch, self._kv_cache, incoming)
        else:
            slots, hidden, adapted = self._decode.slots, self._decode.run(), self._decode.adapted
        if not self._place.is_last:
            self._parallel.send_hidden(hidden)
            self._returning.expect(batch, slots)
            return None
        # A sampled token's position is the number of tokens before it.
        positions = self._state.num_computed[slots]
        tokens, logprobs = self._sampler.sample(
            self._decoder.part_logits(hidden, adapted), batch, slots, positions, bitmask() if bitmask else None
        )
        self._state.last_token[slots] = tokens
        if not self._place.is_first:
            self._parallel.send_tokens(tokens)
        return LaunchedStep(tokens, logprobs, pieces)

    def _apply_updates(self, batch: ScheduledBatch) -> None:
        self._sampler.release(batch.released)
        self._sampler.admit(batch.admitted)
        if len(batch.blocks):
            slots, columns, blocks = self._upload(batch.block_slots, batch.block_columns, batch.blocks)
            self._state.block_table[slots, columns] = blocks
        if self._decoder.adapters is not None:
            for slot, adapter in batch.adapter_loads:
                # Whole weights of an embedding or an LM head lie beside the KV cache.
                with explained(
                    f"loading the adapter {adapter.lora_name!r}", "lower gpu_memory_utilization or max_loras"
                ):
                    self._decoder.adapters.load(slot, adapter.lora_path)
        self._decode.set_plan(batch.decode_plan, batch.adapter_slots[: batch.num_decodes])

    def _set_beams(self, batch: ScheduledBatch) -> None:
        """Copy the blocks that beams no longer share, and set what each computes next."""
        if len(batch.copy_targets):
            sources, targets = (blocks.long() for blocks in self._upload(batch.copy_sources, batch.copy_targets))
            for keys, values in self._kv_cache.layers:
                keys[targets], values[targets] = keys[sources], values[sources]
        if len(batch.beam_slots):
            slots, tokens, counts = self._upload(batch.beam_slots, batch.beam_tokens, batch.beam_counts)
            self._state.last_token[slots] = tokens.long()
            self._state.num_computed[slots] = counts

    def _forward_batch(self, batch: ScheduledBatch) -> tuple[torch.Tensor, ForwardBatch, AdaptedRows | None]:
        """The slots that a step with prefill samples for, its tensors, and its sampled rows that have an adapter."""
        state, num_decodes = self._state, batch.num_decodes
        chunk_of, chunk_positions = _chunk_positions(batch)
        context_lens = batch.prefill_starts + batch.prefill_counts
        prefill_slots, ends, starts, token_ids, positions, token_slots, sample_slots, sample_tokens = self._upload(
            batch.prefill_slots,
            context_lens,
            np.concatenate([[0], np.cumsum(batch.prefill_counts)]),
            batch.prefill_token_ids,
            chunk_positions,
            batch.prefill_slots[chunk_of],
            batch.sample_slots,
            _sample_tokens(batch),
        )
        state.num_computed[prefill_slots] = ends
        positions = positions.long()
        blocks = state.block_table[token_slots, positions // state.block_size].long()
        slot_mapping = blocks * state.block_size + positions % state.block_size
        decode = None
        if num_decodes:
            inputs = state.decode_inputs(self._decode.slots)
            token_ids = torch.cat([inputs.token_ids, token_ids])
            positions = torch.cat([inputs.positions, positions])
            slot_mapping = torch.cat([inputs.slot_mapping, slot_mapping])
            decode = self._decode.rows(num_decodes, inputs.context_lens)
        sampled = self._decode.rows(len(sample_slots), state.num_computed[sample_slots])
        adapters = sampled_adapters = own_embeddings = None
        if len(batch.adapter_slots) and self._decoder.adapters is not None:
            adapters = upload_rows(batch.adapter_slots, self._device)
            sampled_adapters = upload_rows(batch.adapter_slots[_sample_tokens(batch)], self._device)
            own_embeddings = self._decoder.adapters.vocabulary.own_embeddings(token_ids, adapters)
        forward_batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=state.block_table,
            decode=decode,
            prefill=PrefillRows(
                slots=prefill_slots, context_lens=ends, query_starts=starts, longest=int(context_lens.max())
            ),
            sampled=SampledRows(
                slots=sample_slots, context_lens=sampled.context_lens, shared=sampled.shared, tokens=sample_tokens
            ),
            adapters=adapters,
            sampled_adapters=sampled_adapters,
            own_embeddings=own_embeddings,
            embedded=self._embedded_rows(batch),
        )
        return sample_slots, forward_batch, sampled_adapters

    def _embedded_rows(self, batch: ScheduledBatch) -> EmbeddedRows | None:
        if batch.embedded is None or not self._place.is_first:
            return None
        places, values = batch.embedded.places, batch.embedded.values
        tokens, there = upload(self._device, places.astype(np.int64) + batch.num_decodes, values.ravel())
        return EmbeddedRows(tokens=tokens, values=there.view(values.shape).to(self._decoder.dtype))

    def _upload(self, *arrays: npt.NDArray[np.integer]) -> list[torch.Tensor]:
        return upload(self._device, *(array.astype(np.int32, copy=False) for array in arrays))


def step_sizes(least: int, most: int) -> list[int]:
    """Numbers of tokens from `least` to `most`, both included, each larger than the last by a half or a third."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 3 // 2 if len(sizes) % 2 else -(-sizes[-1] * 4 // 3))
    return [size for size in sizes if size < most] + [most]


def _chunk_positions(batch: ScheduledBatch) -> tuple[IntArray, IntArray]:
    """For each prefill token: which chunk it belongs to, and its position."""
    counts = batch.prefill_counts
    chunk_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.cumsum(counts) - counts
    return chunk_of, np.arange(counts.sum(), dtype=np.int32) - first[chunk_of] + batch.prefill_starts[chunk_of]


def _sample_tokens(batch: ScheduledBatch) -> IntArray:
    """The tokens that are sampled from: all decode rows, then the last of each chunk that ends a prefill."""
    num_decodes = batch.num_decodes
    ending = np.isin(batch.prefill_slots, batch.sample_slots[num_decodes:])
    last = num_decodes + np.cumsum(batch.prefill_counts) - 1
    return np.concatenate([np.arange(num_decodes), last[ending]]).astype(np.int32)
