"""What `LLM.embed`, `encode`, `classify` and `score` take, told apart, checked and tokenised.

Owns the pairing of prompts with pooling parameters and of texts with texts, and what `tokenization_kwargs` may say.
Knows no engine.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raydata_llm.engine.param_values import invalid, read_count, read_flag
from raydata_llm.engine.pooling_params import PoolingParams, PoolingTask
from raydata_llm.least_tokens import check_length
from raydata_llm.prompts import Prompt, list_prompts
from raydata_llm.tokenizer import cut_text, encode_whole, render_chat

PoolingParamsLike = PoolingParams | Mapping[str, Any]


@dataclass
class PooledPrompt(Prompt):
    """One prompt, or pair of texts, on its way to a request.

    Args:
        pooling: None when the parameters could not be read (`error` says why).
        pair: The second text.
        token_types: Which text each token is of.
    """

    pooling: PoolingParams | None = None
    pair: str | None = None
    token_types: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How texts become token ids: `tokenization_kwargs`, checked.

    Args:
        truncation: Cut to `max_length`, or to what the model takes.
        max_length: Cut to so many tokens.
        add_special_tokens: Put [CLS] and the like around texts.
    """

    truncation: bool = False
    max_length: int | None = None
    add_special_tokens: bool = True

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any] | None) -> Tokenization:
        """Build from a user's `tokenization_kwargs`.

        Raises:
            ValueError: for a name that means nothing here.
        """
        names = ("truncation", "max_length", "add_special_tokens", "truncate_prompt_tokens")
        if given is not None and not isinstance(given, Mapping):
            kind = type(given).__name__
            raise ValueError(
                f'tokenization_kwargs={reprlib.repr(given)} is a {kind}: give a dict such as {{"truncation": True}}'
            )
        for name, value in (given or {}).items():
            if value is not None and name not in names:
                known = ", ".join(names)
                raise ValueError(f"tokenization_kwargs[{name!r}] is not valid: known are {known}")
        values = {name: value for name, value in (given or {}).items() if value is not None}
        keep = values.pop("truncate_prompt_tokens", None)
        if keep is not None:
            values |= {"truncation": True} | ({} if keep == -1 else {"max_length": keep})
        return cls(**values)

    def __post_init__(self) -> None:
        if isinstance(self.truncation, str):  # transformers' strategies, of which there is one here
            object.__setattr__(self, "truncation", self.truncation != "do_not_truncate")
        for name in ("truncation", "add_special_tokens"):
            object.__setattr__(self, name, read_flag(f"tokenization_kwargs[{name!r}]", getattr(self, name)))
        length = read_count("tokenization_kwargs['max_length']", self.max_length, optional=True)
        if length is not None and length < 1:
            raise invalid("tokenization_kwargs['max_length']", length, "give 1 or more, or None")
        object.__setattr__(self, "max_length", length)

    def max_tokens(self, params: PoolingParams, max_model_len: int | None) -> int | None:
        """What a prompt is cut to; None leaves it whole.

        Args:
            max_model_len: What the model takes; None where only its engine knows.
        """
        keep = params.truncate_prompt_tokens
        if keep is not None:
            return max_model_len if keep == -1 else keep
        return (self.max_length or max_model_len) if self.truncation else None


def pair_pooling_params(prompts: Any, params: Any, task: PoolingTask) -> list[PooledPrompt]:
    """Pair prompts with pooling parameters: none, one for all, or a list with one each.

    Raises:
        ValueError: for a list of another length, or parameters for all that are not valid; those of one prompt in a
            list become that prompt's error.
    """
    given = list_prompts(prompts)
    if params is None or isinstance(params, (PoolingParams, Mapping)):
        one = with_task(params, task)
        return [PooledPrompt(index, prompt, None, pooling=one) for index, prompt in enumerate(given)]
    if not isinstance(params, Sequence) or isinstance(params, str):
        kind = type(params).__name__
        raise ValueError(f"pooling_params={reprlib.repr(params)} is a {kind}: give PoolingParams, a dict, or a list")
    if len(params) != len(given):
        raise ValueError(f"pooling_params has {len(params)} entries for {len(given)} prompts: give one each or one")
    asked = [PooledPrompt(index, prompt, None) for index, prompt in enumerate(given)]

    for prompt, its_params in zip(asked, params, strict=True):

        def read(prompt: PooledPrompt, its_params: Any = its_params) -> None:
            prompt.pooling = with_task(its_params, task)

        prompt.attempt(read)
    return asked


def with_task(params: Any, task: PoolingTask) -> PoolingParams:
    """The parameters with the task that the method is for.

    Raises:
        ValueError: when they name another.
    """
    read = PoolingParams.from_mapping(params)
    if read.task not in (None, task):
        raise ValueError(f"task={read.task!r} in pooling_params is not valid here: leave it out, or ask for {task!r}")
    return replace(read, task=task)


def pair_texts(data_1: Any, data_2: Any) -> list[tuple[Any, Any]]:
    """The pairs that `score` is asked for: one with one, one with each of several, or each with its own.

    Raises:
        ValueError: for lists of different lengths.
    """
    firsts, seconds = list_prompts(data_1), list_prompts(data_2)
    if not firsts or not seconds:
        raise ValueError(f"data_1 has {len(firsts)} texts and data_2 {len(seconds)}: give at least one each")
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise ValueError(
            f"data_1 has {len(firsts)} texts and data_2 {len(seconds)}: give one with several, or as many of each"
        )
    return list(zip(firsts, seconds, strict=True))


def read_pair(prompt: PooledPrompt) -> None:
    """Fill in both texts of a pair.

    Raises:
        ValueError: naming what came instead.
    """
    texts = [one.get("prompt") if isinstance(one, Mapping) else one for one in prompt.given]
    for name, text in zip(("data_1", "data_2"), texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{name}={text!r} is a {type(text).__name__}: give text, which the model reads as a pair")
    prompt.text, prompt.pair = texts


def cut_pair(texts: tuple[str, str], tokenizer: Any, params: PoolingParams) -> tuple[str, str]:
    """Cut the texts of a pair to the tokens that `extra_kwargs` allows each; what is kept stays as written."""
    limits = params.extra_kwargs or {}
    query, document = texts
    return (
        cut_text(tokenizer, query, limits.get("max_tokens_per_query")),
        cut_text(tokenizer, document, limits.get("max_tokens_per_doc")),
    )


@dataclass(frozen=True, kw_only=True)
class PairForm:
    """How a model reads the two texts of a pair.

    Args:
        joins: As one text, with nothing between; else as its tokenizer puts pairs.
        chat_template: A Jinja template that makes one text of messages with the roles `query` and `document`.
        chat_template_kwargs: Its variables.
    """

    joins: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def apply(
        self, prompt: PooledPrompt, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Cut the texts of a prompt's pair where its parameters say so, and make one of them where that is the form.

        Args:
            chat_template_kwargs: The prompt's own variables of the template, over those of all.

        Raises:
            ValueError: for a template that cannot be applied.
        """
        assert prompt.text is not None and prompt.pair is not None and prompt.pooling is not None
        prompt.text, prompt.pair = cut_pair((prompt.text, prompt.pair), tokenizer, prompt.pooling)
        if self.chat_template is not None:
            roles = {"query": prompt.text, "document": prompt.pair}
            messages = [{"role": role, "content": text} for role, text in roles.items()]
            prompt.text = render_chat(
                tokenizer,
                messages,
                chat_template=self.chat_template,
                chat_template_kwargs={**self.chat_template_kwargs, **(chat_template_kwargs or {})},
                add_generation_prompt=False,
            )
            prompt.pair = None
        elif self.joins:
            prompt.text, prompt.pair = f"{prompt.text}{prompt.pair}", None


def encode_prompts(
    prompts: Sequence[PooledPrompt], tokenizer: Any, tokenization: Tokenization, max_model_len: int | None
) -> None:
    """Fill in the token ids of prompts that are text; one that cannot be encoded gets an error."""
    alike: dict[tuple[bool, int | None], list[PooledPrompt]] = {}
    for prompt in prompts:
        if prompt.error is None and prompt.token_ids is None and prompt.pooling is not None:
            length = tokenization.max_tokens(prompt.pooling, max_model_len)
            if length is None and max_model_len is not None:
                prompt.attempt(functools.partial(_check_length, tokenizer, max_model_len))
            if prompt.error is not None:
                continue
            alike.setdefault((prompt.pair is not None, length), []).append(prompt)
    for (_, length), group in alike.items():
        try:
            _encode(group, tokenizer, tokenization, length)
        except Exception:  # one text spoils the batch (a lone surrogate, say): each for itself shows which
            for prompt in group:

                def encode(prompt: PooledPrompt, length: int | None = length) -> None:
                    _encode([prompt], tokenizer, tokenization, length)

                prompt.attempt(encode)


def _check_length(tokenizer: Any, max_model_len: int, prompt: PooledPrompt) -> None:
    for text in (prompt.text, prompt.pair):
        check_length(tokenizer, text or "", max_model_len, "shorten it, or set truncate_prompt_tokens=-1")


def _encode(group: Sequence[PooledPrompt], tokenizer: Any, tokenization: Tokenization, length: int | None) -> None:
    texts = [prompt.text if prompt.text is not None else "" for prompt in group]
    pairs = [prompt.pair or "" for prompt in group] if group[0].pair is not None else None
    special = tokenization.add_special_tokens
    encoded = encode_whole(tokenizer, texts, pairs, max_length=length, add_special_tokens=special)
    for prompt, (token_ids, types) in zip(group, encoded, strict=True):
        prompt.token_ids, prompt.token_types = token_ids, types
