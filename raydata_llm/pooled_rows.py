"""How a row becomes a request of a pooling model, and the columns that it comes back with.

Owns the columns `pooling_params`, `tokenization_kwargs`, `data_1` and `data_2` of a row, and those that a pooled row
has after the engine. Knows no blocks and no engine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from raydata_llm.engine.pooling_params import PoolingParams, PoolingTask
from raydata_llm.engine.pooling_request import PoolingOutput
from raydata_llm.pooling_prompts import (
    PairForm,
    PooledPrompt,
    Tokenization,
    encode_prompts,
    read_pair,
    with_task,
)

TaskType = Literal["generate", "embed", "classify", "score"]
TASK_TYPES: tuple[TaskType, ...] = ("generate", "embed", "classify", "score")
PAIR_COLUMNS = ("data_1", "data_2")
# What a row says to the engine alone.
CONSUMED_COLUMNS = ("pooling_params", "tokenization_kwargs")


def pooling_task(task_type: TaskType) -> PoolingTask | None:
    """The pooling task of a processor; None of one that generates."""
    return None if task_type == "generate" else task_type


def read_pooling(columns: Mapping[str, Any], task: PoolingTask) -> PoolingParams:
    """A row's `pooling_params`.

    Raises:
        ValueError: for parameters that are not valid, or for another task.
    """
    return with_task(columns.get("pooling_params"), task)


def is_pair(columns: Mapping[str, Any]) -> bool:
    """Whether a row has two texts to be read together."""
    return any(columns.get(name) is not None for name in PAIR_COLUMNS)


class PooledTexts:
    """The texts of a block, tokenised together.

    Args:
        tokenizer: The model's.
        max_model_len: What the model takes.
        pair_form: How it reads pairs.
    """

    def __init__(self, tokenizer: Any, max_model_len: int, pair_form: PairForm) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._pair_form = pair_form

    def encode(self, rows: Sequence[tuple[Mapping[str, Any], str | None, PoolingParams]]) -> list[PooledPrompt]:
        """Token ids, or an error, of each row.

        Args:
            rows: Columns; the prompt's text, or None for a pair; parameters.
        """
        prompts = [
            PooledPrompt(index, (columns.get("data_1"), columns.get("data_2")), None, text=text, pooling=params)
            for index, (columns, text, params) in enumerate(rows)
        ]
        alike: dict[Tokenization, list[PooledPrompt]] = {}
        for prompt, (columns, text, _) in zip(prompts, rows, strict=True):
            if text is None:
                prompt.attempt(read_pair)
                form = functools.partial(self._pair_form.apply, tokenizer=self._tokenizer)
                prompt.attempt(functools.partial(form, chat_template_kwargs=columns.get("chat_template_kwargs")))

            def gather(prompt: PooledPrompt, columns: Mapping[str, Any] = columns) -> None:
                tokenization = Tokenization.from_mapping(columns.get("tokenization_kwargs"))
                alike.setdefault(tokenization, []).append(prompt)

            prompt.attempt(gather)
        for tokenization, group in alike.items():
            encode_prompts(group, self._tokenizer, tokenization, self._max_model_len)
        return prompts


def pooled_columns(output: PoolingOutput, task: PoolingTask | None) -> dict[str, Any]:
    """The result's columns: `embeddings` of every task, as Ray Data LLM's, and each task's own."""
    values = np.asarray(output.data)
    return {
        "embeddings": values,
        "probs": values if task == "classify" else None,
        "score": float(values.item()) if task == "score" else None,
    }
