"""The methods of `LLM` for pooling models: `encode`, `embed`, `classify`, `score`, as vLLM's.

Owns their arguments and the making of each method's kind of result. What happens in a call is `pooling_call.py`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from raydata_llm.engine.failed_outputs import NoPooling
from raydata_llm.engine.pooling_params import EMBED_TASKS, PoolingParams, PoolingTask, as_task
from raydata_llm.engine.pooling_request import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from raydata_llm.pooling_call import PoolingCall, RawOutput
from raydata_llm.pooling_prompts import (
    PairForm,
    PooledPrompt,
    PoolingParamsLike,
    Tokenization,
    cut_pair,
    encode_prompts,
    pair_pooling_params,
    pair_texts,
    read_pair,
)
from raydata_llm.progress import Progress
from raydata_llm.prompts import read_prompt, refuse_embeds
from raydata_llm.vllm_settings import refuse_arguments

if TYPE_CHECKING:
    from raydata_llm.engine.pooling_engine import PoolingEngine

UseTqdm = bool | Callable[..., Any]
ManyParams = PoolingParamsLike | Sequence[PoolingParamsLike] | None

# `LLM(task=...)` of older vLLMs.
_TASKS: dict[str, dict[str, str]] = {
    "auto": {},
    "generate": {"runner": "generate"},
    "embed": {"runner": "pooling", "convert": "embed"},
    "embedding": {"runner": "pooling", "convert": "embed"},
    "encode": {"runner": "pooling"},
    "classify": {"runner": "pooling", "convert": "classify"},
    "score": {"runner": "pooling"},
    "reward": {"runner": "pooling"},
}


def read_older_settings(engine_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`task` and `override_pooler_config` of older vLLMs under their present names.

    Raises:
        ValueError: for an unknown task.
    """
    settings = dict(engine_kwargs)
    task = settings.pop("task", None)
    pooler = settings.pop("override_pooler_config", None)
    if task is not None and task not in _TASKS:
        raise ValueError(f"task={task!r} is not valid: choose one of {', '.join(_TASKS)}")
    older = {} if pooler is None else {"pooler_config": pooler}
    return {**_TASKS.get(task or "auto", {}), **older, **settings}


class PoolingMethods(ABC):
    """What `LLM` has for pooling models."""

    _request_ids: Iterator[int]
    _raises: bool

    @abstractmethod
    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""

    @abstractmethod
    def _live_pooling_engine(self) -> PoolingEngine:
        """The engine, if it is one of pooling."""

    def encode(
        self,
        prompts: Any,
        pooling_params: ManyParams = None,
        *,
        use_tqdm: UseTqdm = True,
        pooling_task: PoolingTask | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        lora_request: Any = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Pool prompts; `outputs.data` is a float32 tensor.

        Args:
            prompts: One or a list, mixed at will: text, `{"prompt": text}`, `{"prompt_token_ids": [...]}`, token ids.
            pooling_params: For all, or a list with one each.
            use_tqdm: Show a progress bar (on a terminal or in a notebook), or a class to use as tqdm.
            pooling_task: "token_embed": the hidden state of each token, [tokens, hidden]; "token_classify": the
                classes of each token; or "embed", "classify". None: `pooler_config`'s task, else the model's
                own for tokens if it has one.
            tokenization_kwargs: {"truncation": True, "max_length": n, "add_special_tokens": False}.
            lora_request: None: pooling models take no adapters.

        Returns:
            Results in the order of the prompts. A prompt that cannot be run has `error` set and false `outputs`, of
            which each value says that error (see `on_error` of `LLM`).

        Raises:
            ValueError: for arguments that are wrong for all prompts.
        """
        refuse_arguments(lora_request=lora_request)
        model = self._live_pooling_engine().model
        by_token = next((task for task in model.tasks if task.startswith("token_")), model.tasks[0])
        task = (model.default_task or by_token) if pooling_task is None else as_task(pooling_task)
        outputs = self._pool(prompts, pooling_params, task, use_tqdm, tokenization_kwargs)
        import torch  # the engine has loaded it

        def read(output: PoolingOutput) -> PoolingOutput:
            return PoolingOutput(torch.from_numpy(output.data))

        return [_as(PoolingRequestOutput, read, output) for output in outputs]

    def embed(
        self,
        prompts: Any,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: ManyParams = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        lora_request: Any = None,
    ) -> list[EmbeddingRequestOutput]:
        """An embedding of each prompt; arguments and errors as `encode`'s."""
        refuse_arguments(lora_request=lora_request)
        outputs = self._pool(prompts, pooling_params, "embed", use_tqdm, tokenization_kwargs)
        return [_as(EmbeddingRequestOutput, EmbeddingOutput.from_base, output) for output in outputs]

    def classify(
        self,
        prompts: Any,
        *,
        pooling_params: ManyParams = None,
        use_tqdm: UseTqdm = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        lora_request: Any = None,
    ) -> list[ClassificationRequestOutput]:
        """Each prompt's class probabilities; arguments and errors as `encode`'s."""
        refuse_arguments(lora_request=lora_request)
        outputs = self._pool(prompts, pooling_params, "classify", use_tqdm, tokenization_kwargs)
        return [_as(ClassificationRequestOutput, ClassificationOutput.from_base, output) for output in outputs]

    def score(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParamsLike | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        lora_request: Any = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts fit together: a cross-encoder's score, or the cosine of two embeddings.

        Args:
            data_1: A text, or as many as in data_2.
            data_2: A text or a list.
            use_tqdm: As in `encode`.
            pooling_params: For all pairs.
            tokenization_kwargs: As in `encode`.
            chat_template: For a cross-encoder: a Jinja template that makes one text of a pair, from messages with the
                roles `query` and `document`. None: the tokenizer's form of pairs, or both texts one after the other
                where the scorer is made of a language model (`classifier_from_token`).
            lora_request: As in `encode`.

        Returns:
            A result for each pair, one with a text that cannot be run with `error` set.

        Raises:
            ValueError: for arguments that are wrong for all pairs, or a model that gives no single score.
        """
        refuse_arguments(lora_request=lora_request)
        pairs = pair_texts(data_1, data_2)
        model = self._live_pooling_engine().model
        tasks = model.tasks
        if "score" in tasks:
            asked = pair_pooling_params(pairs, pooling_params, "score")
            form = PairForm(joins=model.joins_pairs, chat_template=chat_template)
            for prompt in asked:
                prompt.attempt(read_pair)
                prompt.attempt(functools.partial(form.apply, tokenizer=self.get_tokenizer()))
            outputs = self._run_pooling(asked, use_tqdm, tokenization_kwargs)
            return [_as(ScoringRequestOutput, ScoringOutput.from_base, output) for output in outputs]
        if "embed" not in tasks:
            raise ValueError("score needs a model with one label, or of embeddings: this one has several; use classify")
        if chat_template is not None:
            raise ValueError("chat_template is for models that read pairs: this one embeds each text; leave it out")
        return self._cosines(pairs, pooling_params, use_tqdm, tokenization_kwargs)

    def _cosines(
        self, pairs: list[tuple[Any, Any]], params: Any, use_tqdm: UseTqdm, tokenization_kwargs: Any
    ) -> list[ScoringRequestOutput]:
        asked = PoolingParams.from_mapping(params)
        if asked.extra_kwargs is not None:
            pairs = [cut_pair(_two_texts(pair), self.get_tokenizer(), asked) for pair in pairs]
            params = dataclasses.replace(asked, extra_kwargs=None)
        texts: list[Any] = []
        places: dict[Any, int] = {}

        def place(text: Any) -> int:
            """Where the text is embedded; the same text, once."""
            key = text if isinstance(text, str) else id(text)
            if key not in places:
                places[key] = len(texts)
                texts.append(text)
            return places[key]

        at = [(place(first), place(second)) for first, second in pairs]
        outputs = self._pool(texts, params, "embed", use_tqdm, tokenization_kwargs)
        return [_cosine(outputs[first], outputs[second]) for first, second in at]

    def _pool(
        self, prompts: Any, params: Any, task: PoolingTask, use_tqdm: UseTqdm, tokenization_kwargs: Any
    ) -> list[RawOutput]:
        tasks = self._live_pooling_engine().model.tasks
        if task not in tasks:
            kind = "embed" if task in EMBED_TASKS else "classify"
            raise ValueError(
                f"{task!r} does not fit this model, which does {', '.join(tasks)}: build the LLM with "
                f"convert={kind!r} if its files have what that needs, or use another model"
            )
        asked = pair_pooling_params(prompts, params, task)
        for prompt in asked:
            prompt.attempt(read_prompt)
            prompt.attempt(refuse_embeds)
        return self._run_pooling(asked, use_tqdm, tokenization_kwargs)

    def _run_pooling(
        self, asked: list[PooledPrompt], use_tqdm: UseTqdm, tokenization_kwargs: Mapping[str, Any] | None
    ) -> list[RawOutput]:
        engine = self._live_pooling_engine()
        tokenization = Tokenization.from_mapping(tokenization_kwargs)
        is_text = any(prompt.token_ids is None and prompt.error is None for prompt in asked)
        encode = functools.partial(
            encode_prompts,
            tokenizer=self.get_tokenizer() if is_text else None,
            tokenization=tokenization,
            max_model_len=engine.max_model_len,
        )
        with Progress(len(asked), use_tqdm, "Processed prompts") as progress:
            return PoolingCall(engine, self._request_ids, raises=self._raises).run(asked, encode, progress)


_Output = TypeVar("_Output")
_Request = TypeVar("_Request")


def _as(kind: Callable[..., _Request], read: Callable[[PoolingOutput], _Output], output: RawOutput) -> _Request:
    """A pooled result as a method's own kind."""
    outputs = NoPooling(str(output.error)) if output.outputs is None else read(output.outputs)
    return kind(output.request_id, outputs, output.prompt_token_ids, error=output.error, prompt=output.prompt)


def _two_texts(pair: tuple[Any, Any]) -> tuple[str, str]:
    for name, text in zip(("data_1", "data_2"), pair, strict=True):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"{name} has a {kind}, which extra_kwargs of pooling_params cannot cut: give text")
    return pair


def _cosine(first: RawOutput, second: RawOutput) -> ScoringRequestOutput:
    ids = [*first.prompt_token_ids, *second.prompt_token_ids]
    prompt = (first.prompt, second.prompt)
    error = first.error or second.error
    if first.outputs is None or second.outputs is None:
        no_score: Any = NoPooling(str(error))
        return ScoringRequestOutput(first.request_id, no_score, ids, error=error, prompt=prompt)
    one, other = (output.data.astype("float64") for output in (first.outputs, second.outputs))
    norms = float((one @ one) * (other @ other)) ** 0.5
    score = float(one @ other) / norms if norms else 0.0
    return ScoringRequestOutput(first.request_id, ScoringOutput(score), ids, prompt=prompt)
