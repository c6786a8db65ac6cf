"""A step's work in two forms: the scheduler's choice, and the tensors that the model computes on.

A scheduled batch is made of compact host arrays (what crosses to other ranks); the model runner turns it into a
forward batch on the device. Decode rows come first, then the prefill chunks' tokens.

Shapes: D decode rows, P prefill chunks, T tokens of the step, N rows to sample (all D, then the chunks that end
their prefill).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.sequence import IntArray, Sequence


@dataclass(frozen=True, kw_only=True)
class ScheduledBatch:
    """The scheduler's choice for one step.

    Args:
        decode_slots: [D] slots that compute their last sampled token.
        prefill_slots: [P] slots that compute a chunk of known tokens.
        prefill_starts: [P] position of each chunk's first token.
        prefill_counts: [P] tokens of each chunk.
        prefill_token_ids: the chunks' tokens, one after the other.
        sample_slots: [N] slots that sample a token in this step.
        sample_seq_ids: [N] whose token it is (a slot may have a new sequence by the time the token is read).
        sample_positions: [N] position the sampled token will have.
        block_slots, block_columns, blocks: [U] block table entries that are new in this step.
        released: slots given up since the last step.
        admitted: sequences that got a slot in this step.
        max_decode_context, max_prefill_context: tokens that the longest row attends to.
    """

    decode_slots: IntArray
    prefill_slots: IntArray
    prefill_starts: IntArray
    prefill_counts: IntArray
    prefill_token_ids: IntArray
    sample_slots: IntArray
    sample_seq_ids: npt.NDArray[np.int64]
    sample_positions: IntArray
    block_slots: IntArray
    block_columns: IntArray
    blocks: IntArray
    released: list[int]
    admitted: list[tuple[int, Sequence]]
    max_decode_context: int
    max_prefill_context: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode_slots) + len(self.prefill_token_ids)


@dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """Rows of a forward batch that attend to their paged KV.

    Args:
        block_table: [rows, blocks] int32.
        context_lens: [rows] int32; keys each row's last query may see, itself included.
        query_starts: [rows + 1] int32; the rows' queries, one after the other. None in decode: a query a row.
    """

    block_table: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """A step's tensors.

    Args:
        token_ids: [T] int64.
        positions: [T] int64.
        slot_mapping: [T] int64; where each token's KV goes: block * block_size + offset.
        num_decodes: D.
        decode, prefill: None where the step has none.
        sample_rows: [N] int64; tokens whose hidden state is sampled from.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    decode: AttentionRows | None
    prefill: AttentionRows | None
    sample_rows: torch.Tensor
