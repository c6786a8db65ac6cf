"""A step's work in two forms: the scheduler's choice, and the tensors that the model computes on.

A scheduled batch is made of compact host arrays (what crosses to other ranks); the model runner turns it into a
forward batch on the device. Decode rows come first, in their plan's order, then the prefill chunks' tokens.

Shapes: D decode rows, P prefill chunks, T tokens of the step, N rows to sample (all D, then the chunks that end
their prefill).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.adapter_tiles import AdaptedRows
from raydata_llm.engine.decode_plan import DecodePlan
from raydata_llm.engine.prompt_embeds import EmbeddedTokens
from raydata_llm.engine.request import LoRARequest
from raydata_llm.engine.sequence import IntArray, Sequence
from raydata_llm.kernels.paged_attention import SharedPrefixes

_NO_INTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class ScheduledBatch:
    """The scheduler's choice for one step.

    Args:
        decode_plan: the D slots that compute their last sampled token.
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
        adapter_slots: [T] the slot of each token's adapter, -1 for none; empty where no sequence has one.
        adapter_loads: adapters that are to be copied into their slots first.
        prompt_logprob_chunks: number and sequence of the chunks whose tokens' log-probabilities are asked for.
        copy_sources, copy_targets: [C] blocks to copy first; no target is a source.
        beam_slots, beam_tokens, beam_counts: [B] slots of beams, the token that each computes in this step, and how
            many it has computed before; of other slots the device knows both.
        embedded: prefill tokens that are computed from an embedding of their own; None where the step has none.
    """

    decode_plan: DecodePlan
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
    prompt_logprob_chunks: list[tuple[int, Sequence]] = field(default_factory=list)
    adapter_slots: IntArray = field(default_factory=lambda: _NO_INTS)
    adapter_loads: list[tuple[int, LoRARequest]] = field(default_factory=list)
    copy_sources: IntArray = field(default_factory=lambda: _NO_INTS)
    copy_targets: IntArray = field(default_factory=lambda: _NO_INTS)
    beam_slots: IntArray = field(default_factory=lambda: _NO_INTS)
    beam_tokens: IntArray = field(default_factory=lambda: _NO_INTS)
    beam_counts: IntArray = field(default_factory=lambda: _NO_INTS)
    embedded: EmbeddedTokens | None = None

    @property
    def num_decodes(self) -> int:
        """D: rows that compute their last sampled token."""
        return len(self.decode_plan.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return self.num_decodes + len(self.prefill_token_ids)


@dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """Rows of a forward batch that attend to their paged KV.

    Args:
        slots: [rows] integer; the rows of the block table that are theirs.
        context_lens: [rows] int32; keys each row's last query may see, itself included.
    """

    slots: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeRows(AttentionRows):
    """Rows with one query each.

    Args:
        shared: Groups of rows with a common prefix, if any.
    """

    shared: SharedPrefixes | None


@dataclass(frozen=True, kw_only=True)
class PrefillRows(AttentionRows):
    """Rows with a chunk of queries each.

    Args:
        query_starts: [rows + 1] int32; the rows' queries, one after the other.
        longest: The largest of `context_lens`.
    """

    query_starts: torch.Tensor
    longest: int


@dataclass(frozen=True, kw_only=True)
class SampledRows(DecodeRows):
    """The queries that are sampled from, of a step that has others too.

    Args:
        tokens: [rows] integer; their places among the step's tokens.
    """

    tokens: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class EmbeddedRows:
    """Tokens that are computed from an embedding of their own.

    Args:
        tokens: [E] int64; their places among the step's tokens.
        values: [E, hidden] in the model's dtype.
    """

    tokens: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class OwnEmbeddings:
    """Embeddings of tokens whose adapters change them; this rank's part, before the ranks' sum.

    Args:
        present: [T, 1] bool; which tokens those are.
        values: [T, hidden].
    """

    present: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """A step's tensors.

    Args:
        token_ids: [T] int64.
        positions: [T] int64.
        slot_mapping: [T] int64; where each token's KV goes: block * block_size + offset.
        block_table: [slots, blocks] int32.
        decode, prefill: None where the step has none.
        sampled: None where every token is sampled from.
        adapters: The tokens that have an adapter; None where none has.
        sampled_adapters: The same of the tokens of `sampled`.
        own_embeddings: Those of tokens whose adapters change them; None for none.
        embedded: None where every token is looked up by its id.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | None
    sampled: SampledRows | None
    adapters: AdaptedRows | None = None
    sampled_adapters: AdaptedRows | None = None
    own_embeddings: OwnEmbeddings | None = None
    embedded: EmbeddedRows | None = None
