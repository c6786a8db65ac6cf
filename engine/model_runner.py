"""Runs scheduled batches on the device.

Owns the device's state: weights, KV cache, and per slot the last token, the count of computed tokens, the block table
and the sampling parameters. A step's decode inputs are made from that state, so launching a step needs no token of an
earlier one on the host; sampled tokens come back by one asynchronous copy. Knows no requests' ends and no queue.

Shapes as in batch.py; S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.batch import AttentionRows, ForwardBatch, ScheduledBatch
from raydata_llm.engine.decoder import Decoder, KVCache
from raydata_llm.engine.sampler import SampledLogprobs, Sampler
from raydata_llm.engine.sequence import IntArray


@dataclass(frozen=True)
class HostLogprobs:
    """`SampledLogprobs` on the host."""

    rows: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float32]


class LaunchedStep:
    """A step under way; `read` is the loop's one wait for the device."""

    def __init__(self, tokens: torch.Tensor, logprobs: SampledLogprobs | None) -> None:
        self._tokens = _to_host(tokens)
        self._logprobs = logprobs and SampledLogprobs(
            rows=logprobs.rows,
            chosen=_to_host(logprobs.chosen),
            ranks=_to_host(logprobs.ranks),
            top_ids=_to_host(logprobs.top_ids),
            top_logprobs=_to_host(logprobs.top_logprobs),
        )
        self._done = torch.cuda.Event() if tokens.is_cuda else None
        if self._done is not None:
            self._done.record()

    def read(self) -> tuple[IntArray, HostLogprobs | None]:
        """Wait for the step and return its sampled tokens, [N], and log-probabilities."""
        if self._done is not None:
            self._done.synchronize()
        tokens: IntArray = self._tokens.numpy().astype(np.int32)
        if self._logprobs is None:
            return tokens, None
        return tokens, HostLogprobs(
            rows=self._logprobs.rows,
            chosen=self._logprobs.chosen.numpy(),
            ranks=self._logprobs.ranks.numpy(),
            top_ids=self._logprobs.top_ids.numpy(),
            top_logprobs=self._logprobs.top_logprobs.numpy(),
        )


class ModelRunner:
    """See the module's docstring.

    Args:
        decoder: The loaded model.
        kv_cache: Its memory of keys and values.
        num_slots: S.
        max_blocks: Blocks of a sequence at most.
        block_size: Tokens of a block.
        num_penalty_rows: Rows with penalties at once at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        *,
        num_slots: int,
        max_blocks: int,
        block_size: int,
        num_penalty_rows: int,
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._device = decoder.device
        self._sampler = Sampler(num_slots, decoder.config.vocab_size, num_penalty_rows, self._device)
        self._last_token = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        self._num_computed = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        self._block_table = torch.zeros((num_slots, max_blocks), dtype=torch.int32, device=self._device)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start a step; steps run in launch order."""
        self._apply_updates(batch)
        hidden = self._decoder.forward(self._forward_batch(batch), self._kv_cache)
        tokens, logprobs = self._sampler.sample(self._decoder.logits(hidden), batch)
        self._last_token[self._upload(batch.sample_slots)] = tokens
        return LaunchedStep(tokens, logprobs)

    def _apply_updates(self, batch: ScheduledBatch) -> None:
        self._sampler.release(batch.released)
        self._sampler.admit(batch.admitted)
        if len(batch.blocks):
            slots, columns = self._upload(batch.block_slots), self._upload(batch.block_columns)
            self._block_table[slots, columns] = self._upload(batch.blocks).int()

    def _forward_batch(self, batch: ScheduledBatch) -> ForwardBatch:
        decode_slots = self._upload(batch.decode_slots)
        prefill_slots = self._upload(batch.prefill_slots)
        decode_positions = self._num_computed[decode_slots]
        self._num_computed[decode_slots] += 1
        self._num_computed[prefill_slots] = self._upload(batch.prefill_starts + batch.prefill_counts)
        chunk_of, prefill_positions = _chunk_positions(batch)
        token_slots = torch.cat([decode_slots, prefill_slots[self._upload(chunk_of)]])
        positions = torch.cat([decode_positions, self._upload(prefill_positions)])
        blocks = self._block_table[token_slots, positions // self._block_size].long()
        return ForwardBatch(
            token_ids=torch.cat([self._last_token[decode_slots], self._upload(batch.prefill_token_ids)]),
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            num_decodes=len(batch.decode_slots),
            decode=self._rows(decode_slots, batch.max_decode_context) if len(batch.decode_slots) else None,
            prefill=self._prefill_rows(prefill_slots, batch) if len(batch.prefill_slots) else None,
            sample_rows=self._upload(_sample_rows(batch)),
        )

    def _rows(self, slots: torch.Tensor, max_context: int, query_starts: torch.Tensor | None = None) -> AttentionRows:
        columns = -(-max_context // self._block_size)
        return AttentionRows(
            block_table=self._block_table[slots, :columns],
            context_lens=self._num_computed[slots].int(),
            query_starts=query_starts,
        )

    def _prefill_rows(self, slots: torch.Tensor, batch: ScheduledBatch) -> AttentionRows:
        starts = np.concatenate([[0], np.cumsum(batch.prefill_counts)])
        return self._rows(slots, batch.max_prefill_context, self._upload(starts).int())

    def _upload(self, numbers: npt.NDArray[np.integer]) -> torch.Tensor:
        tensor = torch.from_numpy(numbers.astype(np.int64))
        if self._device.type == "cpu":
            return tensor
        # Pinned, so that the copy does not wait for the steps before it.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _chunk_positions(batch: ScheduledBatch) -> tuple[IntArray, IntArray]:
    """For each prefill token: which chunk it belongs to, and its position."""
    counts = batch.prefill_counts
    chunk_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.cumsum(counts) - counts
    return chunk_of, np.arange(counts.sum(), dtype=np.int32) - first[chunk_of] + batch.prefill_starts[chunk_of]


def _sample_rows(batch: ScheduledBatch) -> IntArray:
    """The tokens whose hidden states are sampled: all decode rows, then the last of each chunk that ends a prefill."""
    num_decodes = len(batch.decode_slots)
    ending = np.isin(batch.prefill_slots, batch.sample_slots[num_decodes:])
    last = num_decodes + np.cumsum(batch.prefill_counts) - 1
    return np.concatenate([np.arange(num_decodes), last[ending]]).astype(np.int32)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
