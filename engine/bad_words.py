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


class BadWords:
    """Token sequences, in the form in which outputs are compared with them; shared by all that may not hold them."""

    def __init__(self, sequences: Sequence[TokenIds]) -> None:
        self.always = tuple(one[0] for one in sequences if len(one) == 1)
        # By the token that comes before their last: few of some thousands go with an output's last token.
        self.longer: dict[int, list[tuple[list[int], int]]] = {}
        for one in sequences:
            if len(one) > 1:
                self.longer.setdefault(one[-2], []).append((list(one[:-1]), one[-1]))
        self.longest = max(map(len, sequences), default=1) - 1


class BadWordsGuide:
    """Bans the last token of each sequence whose other tokens the output ends with."""

    def __init__(self, words: BadWords) -> None:
        self._words = words
        # The output's end: as much of it as matters, or up to twice that.
        self._tail: list[int] = []

    def advance(self, token_id: int) -> None:
        """Take in a drawn token."""
        longest = self._words.longest
        if longest:
            self._tail.append(token_id)
            if len(self._tail) > 2 * longest:
                del self._tail[:-longest]

    def forbid(self, words: npt.NDArray[np.int32]) -> None:
        """Clear the bits of tokens that would complete a word."""
        near = self._words.longer.get(self._tail[-1], []) if self._tail else []
        completing = (last for before, last in near if self._tail[-len(before) :] == before)
        clear_bits(words, (*self._words.always, *completing))
