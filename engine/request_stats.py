"""When a request passed its stations: what vLLM calls `RequestOutput.metrics`.

Owns its names, as vLLM's, and what each is the time of. Knows no engine (importing it must not import torch).
Invariant: it is told of changes of state, never of a token, so that it costs a running row nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self


@dataclass
class RequestStateStats:
    """A request's times; 0 where it did not get so far. Those of n outputs are the first and the last one's.

    Args:
        num_generation_tokens: Output tokens, of all n outputs together.
        arrival_time: When the request was made, in seconds since 1970.
        queued_ts: When the engine took it, on the engine's monotonic clock, as the next three: only differences say
            something.
        scheduled_ts: When its first prompt token was scheduled.
        first_token_ts: When its first output token was read.
        last_token_ts: When its last one was.
        first_token_latency: Seconds from `arrival_time` to the first output token.
        is_corrupted: vLLM's mark of outputs from NaN logits, which are not looked for: always False.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    is_corrupted: bool = False

    @classmethod
    def queued(cls, arrival_time: float) -> Self:
        """Of a request that the engine takes now."""
        return cls(arrival_time=arrival_time, queued_ts=time.monotonic())

    def scheduled(self, now: float) -> None:
        """A sequence of it got a slot, for the first time or again."""
        self.scheduled_ts = self.scheduled_ts or now

    def prefilled(self, now: float) -> None:
        """A sequence of it has the token that its prefill ends with; after a preemption that is not its first."""
        if not self.first_token_ts:
            self.first_token_ts, self.first_token_latency = now, time.time() - self.arrival_time

    def finished(self, num_tokens: int, last_read: float) -> None:
        """All of it ended.

        Args:
            num_tokens: Of its outputs.
            last_read: When the engine last read tokens.
        """
        self.num_generation_tokens = num_tokens
        self.last_token_ts = last_read if num_tokens else 0.0
