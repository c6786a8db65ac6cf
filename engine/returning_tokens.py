"""Sampled tokens on their way from a pipeline's last stage back to the first.

Owns which steps' tokens the first stage has not received yet. It receives them when a step is launched that decodes
one of their slots, not before: until then the stages work on different steps. Tokens come in the order of the steps.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decode_step import SlotState
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.sequence import IntArray

# Steps' tokens not yet received at most, as a multiple of the stages.
_MOST_AWAITED = 4


class ReturningTokens:
    """See the module's docstring; elsewhere than on the first of several stages it does nothing."""

    def __init__(self, state: SlotState, parallel: ParallelState) -> None:
        self._state, self._parallel = state, parallel
        place = parallel.place
        self._waits = place.is_first and not place.is_last
        self._awaited: deque[tuple[IntArray, torch.Tensor]] = deque()

    def expect(self, batch: ScheduledBatch, slots: torch.Tensor) -> None:
        """A step has been handed on that samples for these slots."""
        if self._waits and len(batch.sample_slots):
            # The plan's buffer, which `slots` may be part of, is filled again.
            self._awaited.append((batch.sample_slots, slots.clone()))

    def receive_for(self, batch: ScheduledBatch) -> None:
        """Receive the tokens that this step decodes."""
        needed = 0
        for number, (slots, _) in enumerate(self._awaited, start=1):
            if np.isin(batch.decode_plan.slots, slots).any():
                needed = number
        needed = max(needed, len(self._awaited) - _MOST_AWAITED * self._parallel.place.pp_size)
        for _ in range(needed):
            _, there = self._awaited.popleft()
            self._state.last_token[there] = self._parallel.receive_tokens(len(there))
