"""Log-probabilities of many positions in six flat lists, for requests with `flat_logprobs`.

Owns the layout, vLLM's: position p has the entries from start_indices[p] to end_indices[p]. A million positions are
a few lists, not millions of objects that the garbage collector walks through.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

from raydata_llm.engine.request import Logprob


class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """Reads as a sequence of {token id: Logprob}; a prompt's first position is empty."""

    def __init__(self, positions: Iterable[Mapping[int, Logprob] | None] = ()) -> None:
        self.start_indices: list[int] = []
        self.end_indices: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int | None] = []
        self.decoded_tokens: list[str | None] = []
        self.extend(positions)

    @classmethod
    def of_entries(
        cls,
        counts: Iterable[int],
        token_ids: list[int],
        logprobs: list[float],
        ranks: list[int | None],
        decode: Callable[[int], str] | None,
    ) -> FlatLogprobs:
        """Take entries of all positions, one position's after the other's.

        Args:
            counts: How many entries each position has.
            decode: What a token says, or None if nobody knows.
        """
        flat = cls()
        flat.end_indices = list(itertools.accumulate(counts))
        flat.start_indices = [0, *flat.end_indices[:-1]] if flat.end_indices else []
        flat.token_ids, flat.logprobs, flat.ranks = token_ids, logprobs, ranks
        flat.decoded_tokens = [None] * len(token_ids) if decode is None else [decode(one) for one in token_ids]
        return flat

    def append(self, position: Mapping[int, Logprob] | None) -> None:
        """Add a position."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (position or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, positions: Iterable[Mapping[int, Logprob] | None]) -> None:
        """Add positions."""
        for position in positions:
            self.append(position)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> dict[int, Logprob] | FlatLogprobs:
        if isinstance(index, slice):
            return FlatLogprobs(self[one] for one in range(len(self))[index])
        entries = range(self.start_indices[index], self.end_indices[index])
        return {
            self.token_ids[at]: Logprob(self.logprobs[at], self.ranks[at], self.decoded_tokens[at]) for at in entries
        }
