"""Log-probabilities of a sequence's positions, kept as the device wrote them and read as vLLM's maps.

Owns the bytes: a position costs the engine one slice of a step's answer. The maps, {token id: Logprob}, are made when
somebody reads one, in the reader's thread. Knows no logits.

A position's record (kernels/logprobs.py): its own token's logprob and rank, then `num_top` pairs of token and
logprob, then a logprob for each token that the request named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.flat_logprobs import FlatLogprobs
from raydata_llm.engine.request import Logprob

_WORD = 4
# As kernels/logprobs.py has it, which is not imported: who reads results may have no torch.
HEAD = 2
Position = TypeVar("Position", bound=dict[int, Logprob] | None)
DecodeToken = Callable[[int], str]


@dataclass(frozen=True)
class Wanted:
    """What a position's map holds beside the position's own token.

    Args:
        num_top: How many of the likeliest tokens; the vocabulary's size for all.
        token_ids: Tokens that the request named, each once.
    """

    num_top: int
    token_ids: tuple[int, ...] = ()

    @property
    def top_bytes(self) -> int:
        """Of a record, the named tokens left out."""
        return _WORD * (HEAD + 2 * self.num_top)

    @property
    def named_bytes(self) -> int:
        """Of a record's named tokens."""
        return _WORD * len(self.token_ids)


class PositionLogprobs(Sequence[Position], Generic[Position]):
    """A position's {token id: Logprob}, when asked; a prompt's first position, before which nothing is, has None.

    Reads like a list of them and equals it. What is changed in a map stays changed.
    """

    def __init__(self, wanted: Wanted, *, of_prompt: bool) -> None:
        self.wanted = wanted
        self._num_before = int(of_prompt)
        self._records = bytearray()
        self._record_bytes = wanted.top_bytes + wanted.named_bytes
        self._token_ids: Sequence[int] = ()
        self._decode: DecodeToken | None = None
        self._maps: list[Position] | None = None

    def add(self, record: bytes) -> None:
        """Add a position."""
        self._records += record

    def put(self, start: int, records: bytes) -> None:
        """Set the positions from one on; those that are there already are written over."""
        begin = (start - self._num_before) * self._record_bytes
        assert 0 <= begin <= len(self._records), "prompts are computed from their start"
        self._records[begin : begin + len(records)] = records

    def close(self, token_ids: Sequence[int]) -> None:
        """Tell the positions' own tokens; of a prompt that was given up not all positions are there."""
        assert len(token_ids) >= len(self), (len(token_ids), len(self))
        self._token_ids = token_ids[self._num_before : len(self)]

    def name_tokens(self, decode: DecodeToken) -> None:
        """Have maps tell what each token says."""
        self._decode = decode

    def total(self) -> float:
        """Sum of the positions' own log-probabilities."""
        return float(self._words()[:, 0].copy().view(np.float32).sum(dtype=np.float64))

    def flat(self) -> FlatLogprobs:
        """The same in flat lists."""
        words, num_top = self._words(), self.wanted.num_top
        own = np.asarray(self._token_ids, dtype=np.int64)[:, None]
        tops = words[:, HEAD : HEAD + 2 * num_top]
        top_ids, top_logprobs = tops[:, ::2].astype(np.int64), np.ascontiguousarray(tops[:, 1::2]).view(np.float32)
        names = np.array(self.wanted.token_ids, dtype=np.int64)
        named_ids = np.broadcast_to(names, (len(words), len(names)))
        named = np.ascontiguousarray(words[:, HEAD + 2 * num_top :]).view(np.float32)
        # No rank is known of a token that was only named.
        places = np.broadcast_to(np.arange(1, num_top + 1), top_ids.shape)
        ranks = np.concatenate([words[:, 1:2].astype(np.int64), np.zeros_like(named_ids), places], axis=1)
        token_ids = np.concatenate([own, named_ids, top_ids], axis=1)
        logprobs = np.concatenate([words[:, :1].copy().view(np.float32), named, top_logprobs], axis=1)
        # A position's own token is told once.
        is_entry = np.concatenate([np.ones_like(own, dtype=bool), token_ids[:, 1:] != own], axis=1)
        counts = [0] * self._num_before + is_entry.sum(axis=1).tolist()
        return FlatLogprobs.of_entries(
            counts,
            token_ids[is_entry].tolist(),
            logprobs[is_entry].tolist(),
            [rank or None for rank in ranks[is_entry].tolist()],
            self._decode,
        )

    def _words(self) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._records, dtype=np.int32).reshape(-1, self._record_bytes // _WORD)

    def _read(self) -> list[Position]:
        if self._maps is None:
            maps: Any = list(self.flat())
            maps[: self._num_before] = [None] * self._num_before
            self._maps = maps
        return self._maps

    def as_list(self) -> list[Position]:
        """All positions' maps."""
        return self._read()

    def __len__(self) -> int:
        return self._num_before + len(self._records) // self._record_bytes

    @overload
    def __getitem__(self, index: int) -> Position: ...

    @overload
    def __getitem__(self, index: slice) -> list[Position]: ...

    def __getitem__(self, index: int | slice) -> Position | list[Position]:
        return self._read()[index]

    def __iter__(self) -> Any:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Iterable):
            return self._read() == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._read())

    def __getstate__(self) -> dict[str, Any]:
        if self._decode is not None:
            # A tokenizer stays where it is; what it says goes along.
            self._read()
        return self.__dict__ | {"_decode": None}
