"""Output tokens to text, and the search for stop strings while tokens arrive.

Owns where text is cut. Is handed a tokenizer (anything with transformers' `decode`); loads none.

An output's text is what its tokens add to the prompt's text, as in vLLM: SentencePiece-like tokenizers leave out the
space before a text's first word, so an output that was decoded alone would lose the space between it and its prompt.
Invariant: the text cut here at the end is the text in which `StopStringWatch` found the stop string.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.request import FinishReason
from raydata_llm.engine.rust_panics import no_panic
from raydata_llm.engine.sampling_params import SamplingParams

# An output as it grows; an array where it is the engine's own, which is not to be copied for each token.
OutputTokens = Sequence[int] | npt.NDArray[np.int32]
# A prompt; empty where it was given as embeddings, whose token ids say nothing.
PromptTokens = Sequence[int] | npt.NDArray[np.int32]

# What tokenizers write for bytes that are no text, or no complete character yet.
_INCOMPLETE = "�"
# Tokens of a character at most, one a byte; longer runs are bytes that are no text, and are looked at no further back.
_MOST_HELD = 16
_MOST_BYTES = 4
# Prompt tokens before an output that its text may depend on.
_CONTEXT = 8
# How SentencePiece's vocabularies, and those of byte-level BPE, write a byte.
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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


class TokenDecoder:
    """Text of token ids, with special tokens as the request wants them.

    Args:
        tokenizer: The model's. If it can name tokens (`convert_ids_to_tokens`), an incomplete character at a text's end
            is told from a U+FFFD that was written.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skips_special = params.skip_special_tokens
        # Between special tokens there is a space where the tokenizer puts one, unless it is to be left out.
        joins = not params.skip_special_tokens and not params.spaces_between_special_tokens
        self._joined = _added_tokens(tokenizer) if joins else frozenset[int]()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, incomplete characters included."""
        with no_panic:
            if not self._joined:
                return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips_special)
            return "".join(self._tokenizer.decode(run) for run in _split_between(token_ids, self._joined))

    def decode_complete(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, without the character that its end is within."""
        text = self.decode(token_ids)
        if not self.ends_within_character(token_ids, text):
            return text
        names = self._last_names(token_ids)
        if not names or not _is_fallback(names[-1]):
            return text[:-1]
        # A run of such bytes is text as a whole or not at all: without its last ones, the characters before are.
        for _ in range(min(_MOST_HELD, len(token_ids))):
            token_ids = token_ids[:-1]
            text = self.decode(token_ids)
            if not self.ends_within_character(token_ids, text):
                break
        return text

    def ends_within_character(self, token_ids: Sequence[int], text: str) -> bool:
        """Whether the tokens end within a character.

        Args:
            text: The tokens'.
        """
        if not text.endswith(_INCOMPLETE):
            return False
        if not hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return True
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(_bytes_of, self._last_names(token_ids))))
        return bool(decoder.getstate()[0])

    def context_of(self, prompt_token_ids: PromptTokens) -> tuple[list[int], str]:
        """The end of a prompt, as far as the text of what follows depends on it, and its text."""
        size, num_moved = _CONTEXT, 0
        while True:
            context = _as_list(prompt_token_ids[-size:])
            text = self.decode(context) if context else ""
            if size >= len(prompt_token_ids):
                return context, text
            if not text:  # special tokens, which are left out: a word before them counts
                size *= 2
            elif text.startswith(_INCOMPLETE) and num_moved < _MOST_BYTES - 1:  # it begins within a character
                size, num_moved = size + 1, num_moved + 1
            else:
                return context, text

    def _last_names(self, token_ids: Sequence[int]) -> list[str | bytes]:
        """Names of the last tokens that have a text, as many as a character may have."""
        tokenizer: Any = self._tokenizer
        names: list[str | bytes] = []
        for token_id in reversed(token_ids[-_MOST_HELD:]):
            if len(names) == _MOST_BYTES:
                break
            if self.decode([token_id]):
                names.insert(0, tokenizer.convert_ids_to_tokens([token_id])[0])
        return names


class OutputDecoder:
    """Text of one output, in the context of its prompt.

    Args:
        prompt_token_ids: Empty for a prompt of embeddings.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: PromptTokens) -> None:
        self._tokens = TokenDecoder(tokenizer, params)
        self._context, self._before = self._tokens.context_of(prompt_token_ids)

    def text(self, token_ids: Sequence[int]) -> str:
        """The output's text, without the character that its end is within."""
        return _added(self._before, self._tokens.decode_complete([*self._context, *token_ids]))

    def ends_within_character(self, token_ids: Sequence[int]) -> bool:
        """Whether the output ends within a character."""
        tokens = [*self._context, *token_ids[-_MOST_HELD:]]
        return self._tokens.ends_within_character(tokens, self._tokens.decode(tokens))


def output_text(
    tokenizer: Tokenizer,
    prompt_token_ids: PromptTokens,
    token_ids: Sequence[int],
    params: SamplingParams,
    stop_reason: int | str | None,
    finish_reason: FinishReason | None,
) -> str:
    """Text of a finished output, cut before what stopped it unless `include_stop_str_in_output`.

    Args:
        prompt_token_ids: The prompt, empty if it was given as embeddings.
        token_ids: All output tokens, those that stopped it included.
        stop_reason: The stop string or token id that ended it, None for the model's EOS or none.
        finish_reason: `stop` with a `stop_reason` that is no string means that the last token is the stop token.
    """
    decoder = OutputDecoder(tokenizer, params, prompt_token_ids)
    if isinstance(stop_reason, str) and stop_reason not in params.stop:
        return decoder.text(token_ids)  # nothing in the text stopped it
    if finish_reason != "stop" or (params.include_stop_str_in_output and not isinstance(stop_reason, str)):
        return decoder.text(token_ids)
    if not isinstance(stop_reason, str):
        return decoder.text(token_ids[:-1])
    text = decoder.text(token_ids)
    start = text.find(stop_reason, max(0, _num_complete(decoder, token_ids) - len(stop_reason) + 1))
    if start < 0:
        return text
    end = start + len(stop_reason) if params.include_stop_str_in_output else start
    return text[:end]


def _num_complete(decoder: OutputDecoder, token_ids: Sequence[int]) -> int:
    """How much of the text had been looked at for stop strings before the last token: the string ends after it.

    All that stood before the last token, unless that ended within a character: the watch held it back then, and a token
    may hold more than a part of a character.
    """
    earliest = max(0, len(token_ids) - 1 - _MOST_HELD)
    ends = range(len(token_ids) - 1, earliest, -1)
    complete = (end for end in ends if not decoder.ends_within_character(token_ids[:end]))
    return len(decoder.text(token_ids[: next(complete, earliest)]))


class StopStringWatch:
    """Follows one output and tells when one of its stop strings has appeared.

    Tokens are decoded with those before them as context, at first the prompt's, and a character whose bytes are not all
    there is held back, so a stop string is found across token borders and never in a half-decoded character.

    Args:
        prompt_token_ids: Empty for a prompt of embeddings.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: PromptTokens) -> None:
        self._decoder = TokenDecoder(tokenizer, params)
        self._params = params
        self._longest = max(len(stop) for stop in params.stop)
        self._context, self._before = self._decoder.context_of(prompt_token_ids)
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
        text = self._decoder.decode([*self._context, *fresh])
        if text == self._before and not text.endswith(_INCOMPLETE):
            # Special tokens, which are left out: kept, a thousand of them would be decoded with each one that follows.
            self._num_seen = len(token_ids)
            return ""
        if len(fresh) <= _MOST_HELD and self._decoder.ends_within_character([*self._context, *fresh], text):
            return ""
        added = _added(self._before, text)
        self._context, self._before, self._num_seen = fresh, self._decoder.decode(fresh), len(token_ids)
        return added


def _added(before: str, text: str) -> str:
    """What a text has more than the one before it, which it begins with but for a character that was not complete."""
    if text.startswith(before):
        return text[len(before) :]
    pairs = enumerate(zip(before, text, strict=False))
    return text[next((place for place, (one, other) in pairs if one != other), len(text)) :]


def _as_list(token_ids: PromptTokens) -> list[int]:
    return token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)


def _added_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that stand beside the tokenizer's vocabulary, special ones among them."""
    return frozenset(getattr(tokenizer, "added_tokens_decoder", ()))


def _split_between(token_ids: Sequence[int], added: frozenset[int]) -> Iterator[list[int]]:
    """The tokens, cut between each two of `added` that follow each other."""
    run: list[int] = []
    for token_id in token_ids:
        if run and token_id in added and run[-1] in added:
            yield run
            run = []
        run.append(token_id)
    if run:
        yield run


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself if it can be printed."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _is_fallback(name: str | bytes) -> bool:
    """Whether a token is a byte of SentencePiece's."""
    return isinstance(name, str) and _FALLBACK_BYTE.fullmatch(name) is not None


def _bytes_of(name: str | bytes | None) -> bytes:
    """The bytes that a token at a text's end writes, by its name in the vocabulary."""
    if name is None or isinstance(name, bytes):
        return name or b""
    fallback = _FALLBACK_BYTE.fullmatch(name)
    if fallback:
        return bytes.fromhex(fallback[1])
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return name.encode(errors="replace")
