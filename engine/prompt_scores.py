"""Log-probabilities of tokens that a request names at positions of its prompt: `prompt_logprob_token_ids`.

Owns which rows there are and the matrix that they come in. A row is about the token after a position: the first row is
what is computed at `prompt_logprob_start`, the last what is computed at the last position but one. Knows no tensors.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.sampling_params import SamplingParams

Scores = npt.NDArray[np.float32]
NamedIds = tuple[int, ...]


class PromptScores:
    """One prompt's matrix, filled as its positions are computed.

    Args:
        params: That name tokens.
        num_prompt: Tokens of the prompt, truncated.

    Raises:
        ValueError: for a start outside the prompt, or another number of rows than there are.
    """

    def __init__(self, params: SamplingParams, num_prompt: int) -> None:
        self.start = params.prompt_logprob_start or 0
        num_rows = scored_rows(params, num_prompt)
        self._each = each = ids_of_each_row(params)
        width = len(params.prompt_logprob_token_ids or ()) if each is None else max(map(len, each), default=0)
        # What a row does not name stays as unlikely as can be.
        self._values: Scores = np.full((num_rows, width), -np.inf, dtype=np.float32)
        self._num_known = 0

    @property
    def is_complete(self) -> bool:
        """Whether every row is known."""
        return self._num_known == len(self._values)

    @property
    def values(self) -> Scores | None:
        """float32 [rows, tokens]; None of a prompt that was given up."""
        return self._values if self.is_complete else None

    def put(self, position: int, values: npt.NDArray[Any]) -> None:
        """Set the rows computed at positions from one on; those before the first row are dropped."""
        first = position - self.start
        values, first = values[max(0, -first) :], max(0, first)
        assert first <= self._num_known, "prompts are computed from their start"
        rows = self._values[first : first + len(values)]
        rows[:, : values.shape[1]] = values
        for row, ids in zip(rows, () if self._each is None else self._each[first:], strict=False):
            row[[place >= len(ids) or ids[place] < 0 for place in range(len(row))]] = -np.inf
        self._num_known = max(self._num_known, first + len(rows))


def scored_rows(params: SamplingParams, num_prompt: int) -> int:
    """Rows of a prompt's matrix.

    Raises:
        ValueError: for a start outside the prompt, or another number of rows than there are.
    """
    start, each = params.prompt_logprob_start or 0, ids_of_each_row(params)
    num_rows = num_prompt - 1 - start
    if num_rows < 0:
        raise ValueError(
            f"prompt_logprob_start={start} is outside the prompt of {num_prompt} tokens: give {num_prompt - 1} or less"
        )
    if each is not None and len(each) != num_rows:
        raise ValueError(
            f"prompt_logprob_token_ids has {len(each)} rows where the prompt of {num_prompt} tokens has {num_rows} "
            f"positions from prompt_logprob_start={start} to the last but one: give each a row, or one list"
        )
    return num_rows


def ids_of_each_row(params: SamplingParams) -> tuple[NamedIds, ...] | None:
    """A list of tokens for each row; None where one list is for all."""
    named = params.prompt_logprob_token_ids
    if not named or isinstance(named[0], int):
        return None
    return cast(tuple[NamedIds, ...], named)


def ids_computed_at(params: SamplingParams, begin: int, end: int) -> list[NamedIds]:
    """The tokens named at positions from `begin` to `end`, or one list for all; those of no row are token 0."""
    each = ids_of_each_row(params)
    if each is None:
        return [cast(NamedIds, params.prompt_logprob_token_ids or ())]
    start = params.prompt_logprob_start or 0
    rows = [each[position - start] if position >= start else () for position in range(begin, end)]
    return [tuple(max(0, token_id) for token_id in ids) for ids in rows]
