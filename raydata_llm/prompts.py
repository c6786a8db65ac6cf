"""What `LLM.generate` and `LLM.chat` take, told apart and checked.

Owns the forms of a prompt: text, `{"prompt": text}`, `{"prompt_token_ids": [...]}`, a plain list of token ids,
`{"prompt_embeds": ...}`, or a conversation; and the pairing of prompts with sampling parameters. Knows no tokenizer and
no engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Self, TypedDict

import numpy as np

from raydata_llm.adapter_source import on_this_node
from raydata_llm.engine.prompt_embeds import Embeds, as_embeds
from raydata_llm.engine.request import LoRARequest
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.redaction import redact
from raydata_llm.vllm_settings import refuse_arguments

ParamsLike = SamplingParams | Mapping[str, Any]


class TextPrompt(TypedDict):
    """A prompt of text, for those who like its type said; a plain dict is the same."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt of token ids, with or without the text that they came from."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


class EmbedsPrompt(TypedDict):
    """A prompt of embeddings, [tokens, hidden_size] as a tensor or an array, with or without their text."""

    prompt_embeds: Any
    prompt: NotRequired[str]


@dataclass
class Prompt:
    """One prompt on its way to a request.

    Args:
        index: Its place in the caller's list.
        given: As the caller gave it.
        params: None when they could not be read (`error` says why).
        text: As given, or rendered by the chat template; None when only token ids are known.
        token_ids: As given, or encoded later; of embeddings a 0 each.
        embeds: The prompt as embeddings, if it was given so.
        error: Why it cannot be run, as `Type: message`.
        lora_request: The adapter it is run with.
    """

    index: int
    given: Any
    params: SamplingParams | None
    text: str | None = None
    token_ids: list[int] | None = None
    embeds: Embeds | None = None
    error: str | None = None
    lora_request: LoRARequest | None = None

    def attempt(self, work: Callable[[Self], None]) -> None:
        """Do something with this prompt, unless it failed before; what goes wrong becomes its error."""
        if self.error is not None:
            return
        try:
            work(self)
        except Exception as error:
            self.error = redact(f"{type(error).__name__}: {error}")


def list_prompts(prompts: Any) -> list[Any]:
    """Make a list of what may be one prompt or several.

    Raises:
        ValueError: for what is neither.
    """
    if isinstance(prompts, (str, Mapping)) or _is_token_ids(prompts) or _is_matrix(prompts):
        return [prompts]
    if isinstance(prompts, Iterable) and not isinstance(prompts, bytes):
        return list(prompts)
    raise ValueError(
        f"prompts={prompts!r} is a {type(prompts).__name__}: give text, token ids, "
        '{"prompt": ...}, {"prompt_token_ids": ...}, or a list of these'
    )


def list_conversations(messages: Any) -> list[Any]:
    """Make a list of what may be one conversation (a list of dicts) or several."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        return [messages]
    conversations = list(messages)
    return [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations


def pair_params(given: list[Any], sampling_params: Any, defaults: Mapping[str, Any]) -> list[Prompt]:
    """Pair prompts with sampling parameters: none, one for all, or a list with one each.

    Raises:
        ValueError: for a list of another length, or parameters for all that are not valid; those of one prompt
            in a list become that prompt's error.
    """
    if sampling_params is None or isinstance(sampling_params, (SamplingParams, Mapping)):
        params = SamplingParams.from_mapping(sampling_params, defaults)
        return [Prompt(index, prompt, params) for index, prompt in enumerate(given)]
    if not isinstance(sampling_params, Sequence) or isinstance(sampling_params, str):
        kind = type(sampling_params).__name__
        raise ValueError(
            f"sampling_params={_short(sampling_params)} is a {kind}: give SamplingParams, a dict, or a list"
        )
    if len(sampling_params) != len(given):
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {len(given)} prompts: give one each or one"
        )
    prompts = [Prompt(index, prompt, None) for index, prompt in enumerate(given)]
    for prompt, one in zip(prompts, sampling_params, strict=True):
        prompt.attempt(functools.partial(_read_params, one, defaults))
    return prompts


def check_priority(priority: Any, count: int) -> None:
    """Check what is not used: a whole number for all prompts, or a list with one each.

    Raises:
        ValueError: for anything else.
    """
    if priority is None or _are_integers([priority]):
        return
    if not isinstance(priority, Sequence | np.ndarray) or not _are_integers(priority):
        raise ValueError(f"priority={_short(priority)} is not valid: give a whole number, or a list with one a prompt")
    if len(priority) != count:
        raise ValueError(f"priority has {len(priority)} entries for {count} prompts: give one each or one")


def pair_adapters(prompts: list[Prompt], lora_request: Any) -> None:
    """Give prompts their adapters: none, one for all, or a list with one (or None) each.

    Raises:
        ValueError: for anything else; an adapter that cannot be read is its prompts' error.
    """
    is_list = isinstance(lora_request, Sequence) and not isinstance(lora_request, str)
    each = lora_request if is_list else [lora_request] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"lora_request has {len(each)} entries for {len(prompts)} prompts: give one each or one")
    for prompt, adapter in zip(prompts, each, strict=True):
        if adapter is not None and not isinstance(adapter, LoRARequest):
            raise ValueError(f"lora_request={adapter!r} is a {type(adapter).__name__}: give a LoRARequest")
        prompt.attempt(functools.partial(_take_adapter, adapter))


def _take_adapter(adapter: LoRARequest | None, prompt: Prompt) -> None:
    prompt.lora_request = None if adapter is None else on_this_node(adapter)


def read_prompt(prompt: Prompt) -> None:
    """Fill in text or token ids from what was given.

    Raises:
        ValueError: naming what came instead.
    """
    given = prompt.given
    if isinstance(given, Mapping):
        prompt.text = given.get("prompt")
        refuse_arguments(multi_modal_data=given.get("multi_modal_data"))
        if given.get("prompt_embeds") is not None:
            _read_embeds(prompt, given)
            return
        if given.get("prompt_token_ids") is not None:
            prompt.token_ids = _token_ids(given["prompt_token_ids"])
            return
        given = prompt.text
        if given is None:
            keys = sorted(map(str, prompt.given))
            remedy = "give messages to chat" if "role" in keys else "give prompt, prompt_token_ids or prompt_embeds"
            raise ValueError(f"prompt has the keys {keys}: {remedy}")
    if isinstance(given, str):
        prompt.text = given
        return
    if not isinstance(given, Sequence | np.ndarray):
        remedy = 'give {"prompt_embeds": ...}' if hasattr(given, "detach") else "give text or token ids"
        raise ValueError(f"prompt={_short(given)} is a {type(given).__name__}: {remedy}")
    if _is_matrix(given):
        raise ValueError(f'prompt is a matrix of {len(given)} rows: give {{"prompt_embeds": ...}}')
    prompt.token_ids = _token_ids(given)


def refuse_embeds(prompt: Prompt) -> None:
    """Refuse a prompt of embeddings, where there must be tokens.

    Raises:
        ValueError: if it is one.
    """
    if prompt.embeds is not None:
        raise ValueError("prompt_embeds is taken by generate and enqueue only: give text or token ids")


def _read_embeds(prompt: Prompt, given: Mapping[str, Any]) -> None:
    if given.get("prompt_token_ids") is not None:
        raise ValueError("prompt_token_ids and prompt_embeds are both given: give one of them")
    prompt.embeds = as_embeds(given["prompt_embeds"])
    prompt.token_ids = [0] * len(prompt.embeds)


def _read_params(params: Any, defaults: Mapping[str, Any], prompt: Prompt) -> None:
    prompt.params = SamplingParams.from_mapping(params, defaults)


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, (list, tuple)) and bool(value) and _are_integers(value)


def _is_matrix(value: Any) -> bool:
    """Whether it is an array or tensor of numbers that are no token ids: one prompt's embeddings, not prompts."""
    is_floating = value.is_floating_point() if hasattr(value, "is_floating_point") else _kind(value) == "f"
    return bool(is_floating) and getattr(value, "ndim", 0) == 2


def _kind(value: Any) -> str:
    return str(getattr(getattr(value, "dtype", None), "kind", ""))


def _are_integers(values: Sequence[Any] | np.ndarray) -> bool:
    # By their types, of which there are few: a call for each of ten million tokens takes seconds.
    return all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, values)))


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or not _are_integers(value):
        raise ValueError(f"prompt_token_ids={_short(value)} is not valid: give whole numbers")
    token_ids = list(map(int, value))
    # The engine keeps them in 32 bits: a larger number must not come out as another token.
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < 1 << 31):
        raise ValueError(f"prompt_token_ids={_short(value)} is not valid: token ids are 0 or more, and below 2**31")
    return token_ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
