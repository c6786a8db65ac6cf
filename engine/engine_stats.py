"""What an engine counts of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the engine started, and its state now.

    Args:
        num_running, num_waiting: Sequences.
        kv_usage: Share of the KV blocks that sequences hold.
        num_prompt_tokens: Of finished requests.
        num_output_tokens: Of finished requests.
        num_steps, num_preemptions: Since the start.
        num_decode_rows: Rows that decoded, summed over steps: by num_steps, the mean decode batch.
        num_computed_tokens: Of all steps, prompts and recomputation included.
        num_sampled_tokens: Of all steps, those of unfinished requests included.
        idle_seconds: Without a step in flight, see `idle_clock`.
        starved_seconds: Of these, without a request either.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_steps: int
    num_preemptions: int
    num_decode_rows: int
    num_computed_tokens: int
    num_sampled_tokens: int
    idle_seconds: float
    starved_seconds: float
