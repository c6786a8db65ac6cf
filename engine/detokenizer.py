"""Output tokens to text, and the search for stop strings while tokens arrive.

Owns where text is cut. Is handed a tokenizer (anything with transformers' `decode`); loads none.
Invariant: the text cut here at the end is the text in which `StopStringWatch` found the stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.request import FinishReason
from raydata_llm.engine.rust_panics import no_panic
from raydata_llm.engine.sampling_params import SamplingParams

# An output as it grows; an array where it is the engine's own, which is not to be copied for each token.
OutputTokens = Sequence[int] | npt.NDArray[np.int32]

# What a byte-level tokenizer writes for the bytes of a character that is not complete yet.
_INCOMPLETE = "�"
# Tokens of a character at most, one a byte; longer runs are bytes that are no text, and are looked at no further back.
_MOST_HELD = 16


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        """Text of the token ids."""
        ...


class TextEncoder(Protocol):
    """What the engine needs of a tokenizer where a request names words."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of the text."""
        ...


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], params: SamplingParams) -> str:
    """Text of `token_ids`, as the request wants special tokens treated."""
    with no_panic:
        return tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)


def output_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    params: SamplingParams,
    stop_reason: int | str | None,
    finish_reason: FinishReason | None,
) -> str:
    """Text of a finished output, cut before what stopped it unless `include_stop_str_in_output`.

    Args:
        token_ids: All output tokens, those that stopped it included.
        stop_reason: The stop string or token id that ended it, None for the model's EOS or none.
        finish_reason: `stop` with a `stop_reason` that is no string means that the last token is the stop token.
    """
    if isinstance(stop_reason, str) and stop_reason not in params.stop:
        return decode(tokenizer, token_ids, params)  # nothing in the text stopped it
    if finish_reason != "stop" or (params.include_stop_str_in_output and not isinstance(stop_reason, str)):
        return decode(tokenizer, token_ids, params)
    if not isinstance(stop_reason, str):
        return decode(tokenizer, token_ids[:-1], params)
    text = decode(tokenizer, token_ids, params)
    start = text.find(stop_reason, max(0, _num_complete(tokenizer, token_ids, params) - len(stop_reason) + 1))
    if start < 0:
        return text
    end = start + len(stop_reason) if params.include_stop_str_in_output else start
    return text[:end]


def _num_complete(tokenizer: Tokenizer, token_ids: Sequence[int], params: SamplingParams) -> int:
    """How much of the text had been looked at for stop strings before the last token: the string ends after it.

    All that stood before the last token, unless that ended within a character: the watch held it back then, and a token
    may hold more than a part of a character.
    """
    text = ""
    for end in range(len(token_ids) - 1, max(-1, len(token_ids) - 1 - _MOST_HELD), -1):
        text = decode(tokenizer, token_ids[:end], params)
        if not text.endswith(_INCOMPLETE):
            break
    return len(text.rstrip(_INCOMPLETE))


class StopStringWatch:
    """Follows one output and tells when one of its stop strings has appeared.

    Tokens are decoded with those before them as context, and a character whose bytes are not all there is held
    back, so a stop string is found across token borders and never in a half-decoded character.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._longest = max(len(stop) for stop in params.stop)
        self._context: list[int] = []
        self._num_seen = 0
        self._tail = ""

    def advance(self, token_ids: OutputTokens) -> str | None:
        """Look at the output so far (it only grows) and return the stop string that appeared first, if any."""
        fresh, before = self._decode_fresh(token_ids), len(self._tail)
        window = self._tail + fresh
        self._tail = window[-(self._longest - 1) :] if self._longest > 1 else ""
        # min_tokens: what was whole before an end is allowed does not count later either, what was begun does.
        if len(token_ids) <= self._params.min_tokens:
            return None
        found = [(window.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._params.stop]
        return min(((at, stop) for at, stop in found if at >= 0), default=(0, None))[1]

    def _decode_fresh(self, token_ids: OutputTokens) -> str:
        fresh = [int(token) for token in token_ids[self._num_seen :]]
        context = decode(self._tokenizer, self._context, self._params)
        text = decode(self._tokenizer, [*self._context, *fresh], self._params)
        if text == context:
            # Special tokens, which are left out: kept, a thousand of them would be decoded with each one that follows.
            self._num_seen = len(token_ids)
        if len(text) <= len(context) or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._num_seen = fresh, len(token_ids)
        return text[len(context) :]
