"""Words that an output may not hold: the token that would complete one is banned.

Owns how a word becomes token sequences (at a text's start and after a space). Only the output counts, not the prompt,
as in vLLM. Knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.bits import clear_bits
from raydata_llm.engine.detokenizer import TextEncoder
from raydata_llm.engine.rust_panics import no_panic

TokenIds = tuple[int, ...]


def bad_word_tokens(tokenizer: TextEncoder, words: Sequence[str]) -> list[TokenIds]:
    """The token sequences that write the words, with and without a space before them; white space alone is as given.

    Raises:
        ValueError: for a word that has no tokens.
    """
    found: dict[TokenIds, None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (bare, " " + bare) if bare else (word,):
            with no_panic:
                token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not token_ids:
                raise ValueError(f"bad_words={word!r} is not valid: the tokenizer makes no token of it")
            found[token_ids] = None
    return list(found)


class BadWordsGuide:
    """Bans the last token of each sequence whose other tokens the output ends with."""

    def __init__(self, sequences: Sequence[TokenIds]) -> None:
        self._always = tuple(one[0] for one in sequences if len(one) == 1)
        self._longer = [(list(one[:-1]), one[-1]) for one in sequences if len(one) > 1]
        self._kept = max((len(before) for before, _ in self._longer), default=0)
        # The output's end, as much of it as matters.
        self._tail: list[int] = []

    def advance(self, token_id: int) -> None:
        """Take in a drawn token."""
        if self._kept:
            self._tail = [*self._tail, token_id][-self._kept :]

    def forbid(self, words: npt.NDArray[np.int32]) -> None:
        """Clear the bits of tokens that would complete a word."""
        completing = (last for before, last in self._longer if self._tail[-len(before) :] == before)
        clear_bits(words, (*self._always, *completing))
