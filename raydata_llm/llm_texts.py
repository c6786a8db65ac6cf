"""The texts of an `LLM`: its prompts' become token ids, and its results' token ids become text.

Owns the tokenizer's work for one LLM, and the rule that a text which spoils it costs its own prompt alone. Knows no
engine. Prompts are encoded in a thread of their own, while the caller's fills in results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raydata_llm.engine.detokenizer import output_text
from raydata_llm.engine.flat_logprobs import FlatLogprobs
from raydata_llm.engine.listed_positions import kept_positions
from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.engine.position_logprobs import PositionLogprobs
from raydata_llm.engine.request import Logprob, RequestOutput
from raydata_llm.engine.rust_panics import no_panic
from raydata_llm.least_tokens import TOO_LONG, check_length
from raydata_llm.pooling_prompts import Tokenization
from raydata_llm.prompts import Prompt
from raydata_llm.tokenizer import encode_texts, encode_whole


class Render(Protocol):
    """Makes a conversation's text and token ids."""

    def __call__(self, messages: Any, /, *, most_tokens: int | None) -> tuple[str, list[int]]:
        """Text and token ids; a text of more tokens is refused before it is tokenised, if that shows."""
        ...


class Texts:
    """See the module's docstring.

    Args:
        tokenizer: None leaves token ids as they are; no text is encoded then.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decode_token = functools.lru_cache(maxsize=1 << 16)(self._decode_token)

    def encode(self, tokenization: Tokenization | None, max_model_len: int, prompts: list[Prompt]) -> None:
        """Fill in the token ids, or the errors, of prompts that are texts.

        Args:
            tokenization: As the call's `tokenization_kwargs` say; None: whole, with special tokens.
            max_model_len: The engine's.
        """
        for prompt in prompts:
            if prompt.token_ids is None and (tokenization is None or not tokenization.truncation):
                prompt.attempt(functools.partial(check_prompt_length, self._tokenizer, max_model_len))
        texts = [prompt for prompt in prompts if prompt.error is None and prompt.token_ids is None]
        try:
            encoded = self._token_ids([prompt.text or "" for prompt in texts], tokenization, max_model_len)
        except Exception:  # one text spoils the batch (a lone surrogate, say): each for itself shows which
            for prompt in texts:
                prompt.attempt(functools.partial(self._encode_one, tokenization, max_model_len))
            return
        for prompt, token_ids in zip(texts, encoded, strict=True):
            prompt.token_ids = token_ids

    def finish(self, prompt: Prompt, output: RequestOutput) -> None:
        """Fill in a result's texts; if they cannot be made, it becomes an error."""
        output.prompt, output.lora_request = prompt.text, prompt.lora_request
        prompt.attempt(functools.partial(self._fill_text, output))
        if prompt.error is not None:
            output.fail(prompt.error)

    def _encode_one(self, tokenization: Tokenization | None, max_model_len: int, prompt: Prompt) -> None:
        prompt.token_ids = self._token_ids([prompt.text or ""], tokenization, max_model_len)[0]

    def _token_ids(self, texts: list[str], tokenization: Tokenization | None, max_model_len: int) -> list[list[int]]:
        if tokenization is None:
            return encode_texts(self._tokenizer, texts)
        # One place is left for an output token.
        length = tokenization.max_tokens(PoolingParams(), max_model_len - 1)
        special = tokenization.add_special_tokens
        encoded = encode_whole(self._tokenizer, texts, max_length=length, add_special_tokens=special)
        return [token_ids for token_ids, _ in encoded]

    def _fill_text(self, output: RequestOutput, prompt: Prompt) -> None:
        if self._tokenizer is None or prompt.params is None or not prompt.params.detokenize:
            return
        self._name_positions(kept_positions(output, "prompt_logprobs"))
        before = () if prompt.embeds is not None else output.prompt_token_ids
        for one in output.outputs:
            one.text = output_text(
                self._tokenizer, before, one.token_ids, prompt.params, one.stop_reason, one.finish_reason
            )
            self._name_positions(kept_positions(one, "logprobs"))

    def _name_positions(self, positions: Sequence[dict[int, Logprob] | None] | None) -> None:
        if isinstance(positions, PositionLogprobs):
            positions.name_tokens(self.decode_token)
        elif isinstance(positions, FlatLogprobs):
            positions.decoded_tokens = [self.decode_token(token_id) for token_id in positions.token_ids]

    def _decode_token(self, token_id: int) -> str:
        with no_panic:
            text: str = self._tokenizer.decode([token_id])
        return text


def check_prompt_length(tokenizer: Any, max_model_len: int, prompt: Prompt) -> None:
    """Refuse a text that is far too long, unless it is to be cut, before it is tokenised.

    Raises:
        ValueError: for such a text.
    """
    if prompt.params is not None and prompt.params.truncate_prompt_tokens is None:
        # One place is left for an output token.
        check_length(tokenizer, prompt.text or "", max_model_len - 1, TOO_LONG)


def encode_conversations(render: Render, max_model_len: int, prompts: list[Prompt]) -> None:
    """Fill in the text and the token ids, or the errors, of prompts that are conversations."""
    for prompt in prompts:
        prompt.attempt(functools.partial(_encode_conversation, render, max_model_len))


def write_conversations(write: Callable[[Any], str], prompts: list[Prompt]) -> None:
    """Fill in the text, or the errors, of prompts that are conversations."""

    def fill(prompt: Prompt) -> None:
        prompt.text = write(prompt.given)

    for prompt in prompts:
        prompt.attempt(fill)


def _encode_conversation(render: Render, max_model_len: int, prompt: Prompt) -> None:
    is_cut = prompt.params is not None and prompt.params.truncate_prompt_tokens is not None
    prompt.text, prompt.token_ids = render(prompt.given, most_tokens=None if is_cut else max_model_len - 1)
