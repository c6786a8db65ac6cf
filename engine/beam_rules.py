"""Which candidates of a beam search go on, which are finished and what they score, and when a search can end.

Owns the two sets of rules; knows no blocks and no tokens' past. All beams of a group have the same length, so they
compare by their sums of log-probabilities; scores, which weigh lengths, compare finished sequences.

    score = sum of log-probabilities / length ** length_penalty

                            vllm (ours by default)            transformers
    finished                every end token among the         an end token among the beam_width
                            candidates of each beam           best candidates of the group
    length of a score       prompt and outputs,               outputs, the end token too
                            without the end token
    the search ends         at max_tokens; here as soon as    by early_stopping: as soon as it is likely
                            nothing can change any more       (False), full (True), impossible ("never")

A candidate is a beam with one more token: of each beam the likeliest, so many that enough are no end tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.beam_params import BeamSearchParams

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class Choice(NamedTuple):
    """Candidates by number: those that go on, best first, and those that are finished, with their scores."""

    kept: list[int]
    finished: list[tuple[int, float]]


class Rules(Protocol):
    """See the module's docstring."""

    num_candidates: int

    def choose(self, token_ids: Numbers, sums: Floats, num_outputs: int) -> Choice:
        """Judge candidates.

        Args:
            token_ids: [C] their last tokens.
            sums: [C] of their log-probabilities; -inf for none.
            num_outputs: Their output tokens, the last one included.
        """
        ...

    def can_improve(self, best_sum: float, num_outputs: int, worst: float) -> bool:
        """Whether a running beam may still be better than `worst`, the last of `beam_width` finished scores."""
        ...


class VllmRules:
    """As vLLM's `LLM.beam_search`."""

    def __init__(
        self, params: BeamSearchParams, num_prompt: int, max_outputs: int, end_token_ids: tuple[int, ...]
    ) -> None:
        self._params, self._num_prompt, self._max_outputs = params, num_prompt, max_outputs
        self._end_token_ids = np.array(end_token_ids, dtype=np.int64)
        self.num_candidates = 2 * params.beam_width + max(0, len(end_token_ids) - 1)

    def choose(self, token_ids: Numbers, sums: Floats, num_outputs: int) -> Choice:
        """As `Rules`."""
        is_end = np.isin(token_ids, self._end_token_ids)
        is_there = np.isfinite(sums)
        stops = np.zeros_like(is_end) if self._params.ignore_eos else is_end
        order = np.argsort(-sums, kind="stable")
        kept = order[is_there[order] & ~stops[order]][: self._params.beam_width].tolist()
        ended = np.flatnonzero(is_there & stops).tolist()
        if num_outputs == self._max_outputs:
            ended, kept = [*ended, *kept], []
        lens = self._num_prompt + num_outputs - is_end
        return Choice(kept, [(number, self._score(float(sums[number]), int(lens[number]))) for number in ended])

    def can_improve(self, best_sum: float, num_outputs: int, worst: float) -> bool:
        """As `Rules`: sums only fall, so no descendant scores more than its sum at the length that flatters it most."""
        longest = self._num_prompt + (self._max_outputs if self._params.length_penalty > 0 else num_outputs)
        return self._score(best_sum, longest) > worst

    def _score(self, sum_: float, length: int) -> float:
        return float(sum_ / max(length, 1) ** self._params.length_penalty)


class TransformersRules:
    """As `generate(num_beams=...)` of transformers."""

    def __init__(self, params: BeamSearchParams, max_outputs: int, end_token_ids: tuple[int, ...]) -> None:
        self._params, self._max_outputs = params, max_outputs
        ends = () if params.ignore_eos else end_token_ids
        self._end_token_ids = np.array(ends, dtype=np.int64)
        self.num_candidates = max(2, 1 + len(ends)) * params.beam_width

    def choose(self, token_ids: Numbers, sums: Floats, num_outputs: int) -> Choice:
        """As `Rules`."""
        width = self._params.beam_width
        order = np.argsort(-sums, kind="stable")[: self.num_candidates]
        order = order[np.isfinite(sums[order])]
        stops = np.isin(token_ids[order], self._end_token_ids) | (num_outputs == self._max_outputs)
        finished = order[:width][stops[:width]].tolist()
        scores = [(number, self._score(float(sums[number]), num_outputs)) for number in finished]
        return Choice(order[~stops][:width].tolist(), scores)

    def can_improve(self, best_sum: float, num_outputs: int, worst: float) -> bool:
        """As `Rules`, or as is likely."""
        if self._params.early_stopping is True:
            return False
        never = self._params.early_stopping == "never" and self._params.length_penalty > 0
        return self._score(best_sum, self._max_outputs if never else num_outputs) > worst

    def _score(self, sum_: float, length: int) -> float:
        return float(sum_ / length**self._params.length_penalty)


def rules_of(
    params: BeamSearchParams, num_prompt: int, max_outputs: int, end_token_ids: tuple[int, ...]
) -> VllmRules | TransformersRules:
    """The rules that parameters ask for."""
    if params.rules == "transformers":
        return TransformersRules(params, max_outputs, end_token_ids)
    return VllmRules(params, num_prompt, max_outputs, end_token_ids)
