"""The tree of one beam search: each step's beams by parent and token, and the finished sequences in it.

Owns what beams are on the host; where their KV lies is `beam_group.py`'s. Steps are kept as arrays, sequences are
read out of them once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydata_llm.engine.beam_params import BeamSearchParams, BeamSearchSequence
from raydata_llm.engine.beam_rules import Floats, Numbers, rules_of
from raydata_llm.engine.request import FinishReason, Logprob


@dataclass(frozen=True)
class TopTokens:
    """Of b beams the k likeliest next tokens.

    Args:
        token_ids: [b, k].
        logprobs: [b, k]; -inf where there is no such token.
        ranked: Whether the first is the likeliest of all tokens, and so on.
    """

    token_ids: Numbers
    logprobs: Floats
    ranked: bool

    def position(self, beam: int, token_id: int) -> dict[int, Logprob]:
        """The map of one position."""
        entries = zip(self.token_ids[beam].tolist(), self.logprobs[beam].tolist(), strict=True)
        found = {
            one: Logprob(logprob, place if self.ranked else None)
            for place, (one, logprob) in enumerate(entries, start=1)
            if logprob > float("-inf")
        }
        assert token_id in found, "a beam goes on with one of its candidates"
        return found


@dataclass(frozen=True)
class _Step:
    tops: TopTokens
    parents: Numbers
    token_ids: Numbers


@dataclass(frozen=True)
class _Finished:
    step: int
    parent: int
    token_id: int
    sum: float
    score: float


class BeamTree:
    """One prompt's search.

    Args:
        params: How to search.
        num_prompt: Prompt tokens.
        max_outputs: Output tokens at which every beam ends.
        end_token_ids: The model's.
    """

    def __init__(
        self, params: BeamSearchParams, num_prompt: int, max_outputs: int, end_token_ids: tuple[int, ...]
    ) -> None:
        self._params = params
        self._rules = rules_of(params, num_prompt, max_outputs, end_token_ids)
        self._end_token_ids = () if params.ignore_eos else end_token_ids
        self._steps: list[_Step] = []
        self._finished: list[_Finished] = []
        self._sums: Floats = np.zeros(1)

    @property
    def num_candidates(self) -> int:
        """How many tokens of each beam are to be looked at."""
        return self._rules.num_candidates

    @property
    def num_outputs(self) -> int:
        """Output tokens of each beam."""
        return len(self._steps)

    def advance(self, tops: TopTokens) -> tuple[Numbers, Numbers] | None:
        """Choose the next beams.

        Args:
            tops: Of the beams, in their order.

        Returns:
            The new beams' parents and tokens; None if the search has ended.
        """
        width = tops.token_ids.shape[1]
        token_ids = tops.token_ids.ravel()
        sums = (self._sums[:, None] + tops.logprobs).ravel()
        choice = self._rules.choose(token_ids, sums, len(self._steps) + 1)
        for number, score in choice.finished:
            parent = number // width
            ended = _Finished(len(self._steps), parent, int(token_ids[number]), float(sums[number]), score)
            self._finished.append(ended)
        # Stable: of equal scores the one that was finished first.
        self._finished = sorted(self._finished, key=lambda one: -one.score)[: self._params.beam_width]
        kept = np.array(choice.kept, dtype=np.int64)
        self._steps.append(_Step(tops, kept // width, token_ids[kept]))
        self._sums = sums[kept]
        if not len(kept) or self._is_settled():
            return None
        return self._steps[-1].parents, self._steps[-1].token_ids

    def sequences(self, prompt: list[int]) -> list[BeamSearchSequence]:
        """The finished sequences, best first."""
        return [self._sequence(one, prompt) for one in self._finished]

    def _is_settled(self) -> bool:
        """Whether what is finished is what the search will return."""
        if len(self._finished) < self._params.beam_width:
            return False
        return not self._rules.can_improve(float(self._sums[0]), len(self._steps), self._finished[-1].score)

    def _sequence(self, ended: _Finished, prompt: list[int]) -> BeamSearchSequence:
        outputs = [ended.token_id]
        logprobs = [self._steps[ended.step].tops.position(ended.parent, ended.token_id)]
        beam = ended.parent
        for step in reversed(self._steps[: ended.step]):
            token_id, beam = int(step.token_ids[beam]), int(step.parents[beam])
            outputs.append(token_id)
            logprobs.append(step.tops.position(beam, token_id))
        stopped = ended.token_id in self._end_token_ids
        reason: FinishReason = "stop" if stopped else "length"
        return BeamSearchSequence(
            tokens=[*prompt, *reversed(outputs)],
            logprobs=logprobs[::-1],
            cum_logprob=ended.sum,
            finish_reason=reason,
            stop_reason=ended.token_id if stopped else None,
            score=ended.score,
        )
