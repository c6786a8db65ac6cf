"""What the scheduler may hand out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What a step and the whole engine may use at most.

    Args:
        max_num_seqs: Running sequences.
        max_num_batched_tokens: Tokens of a step; at least `max_num_seqs`.
        max_model_len: Tokens of a sequence.
        block_size: Tokens of a block.
        max_penalty_seqs: Running sequences with penalties (their token counts live in a pool of this many rows).
        enable_chunked_prefill: Whether a prompt may be computed over several steps.
        enable_prefix_caching: Whether equal prefixes share blocks.
        share_prefixes: Whether decode rows with a common prefix are grouped.
        num_lanes: Groups of sequences that take turns.
        max_loras: Adapters at once.
        least_slots: Slots for beams, which may be more than sequences run otherwise.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    max_penalty_seqs: int
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    share_prefixes: bool = False
    num_lanes: int = 1
    max_loras: int = 0
    least_slots: int = 0

    @property
    def num_slots(self) -> int:
        """Slots of the tables on the host and on the device."""
        return max(self.max_num_seqs, self.least_slots)
