"""One row on its way to a request: what `preprocess` made of it, and which of its columns are prompt and adapter.

Owns that choice, and the words for a row in which there is nothing to choose. Knows no blocks and no engine; texts are
left for the operator, which tokenises those of all rows together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydata_llm.adapter_names import place_of_adapter
from raydata_llm.arrow_values import ArrowRow
from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.engine.prompt_embeds import Embeds, as_embeds
from raydata_llm.engine.request import LoRARequest
from raydata_llm.pooled_rows import is_pair
from raydata_llm.prepare_plan import PreparePlan, Row
from raydata_llm.tokenizer import render_chat
from raydata_llm.vllm_settings import refuse_arguments

EMBEDS_COLUMN = "prompt_embeds"
# What a request is made of, and whether it may be JSON's text: of such a column Arrow changes nothing.
_ASKING_COLUMNS = {
    "messages": True,
    "tools": True,
    "chat_template_kwargs": True,
    "sampling_params": True,
    "pooling_params": True,
    "tokenization_kwargs": True,
    "tokenized_prompt": False,
}


@dataclass
class Draft:
    """One row on its way to a request.

    Args:
        row: As Ray Data has it: with what Arrow did to it.
        made: What `preprocess` returned.
        asked: Both together, `made` before `row`, with the request's own columns as the row has them alone.
    """

    row: Row
    made: Row = field(default_factory=dict)
    asked: Row = field(default_factory=dict)
    prompt: str | None = None
    templated: bool = False
    token_ids: Any = None
    embeds: Embeds | None = None
    error: str | None = None
    pooling: PoolingParams | None = None
    token_types: list[int] | None = None
    lora_request: LoRARequest | None = None
    lora_root: str = ""

    @property
    def columns(self) -> Row:
        """The row with what `preprocess` made, which comes first where names are the same."""
        return {**self.row, **self.made}

    @property
    def carried(self) -> Row:
        """What `preprocess` made, without what the engine alone needs, which is large."""
        return self.made if self.embeds is None else {n: v for n, v in self.made.items() if n != EMBEDS_COLUMN}


def read_asked(draft: Draft, arrow: ArrowRow) -> None:
    """Fill in what the row asks for.

    Raises:
        TypeError, ValueError: for text that is no JSON, and for `chat_template_kwargs` that are no dict of names.
    """
    draft.asked = columns = draft.columns
    for name, may_be_text in _ASKING_COLUMNS.items():
        if columns.get(name) is not None:
            value = columns[name]
            read = _read_json(name, value) if may_be_text else value
            columns[name] = arrow.taken_out(value) if read is value else read
    variables = columns.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise TypeError(
            f"chat_template_kwargs={_short(variables)} is a {type(variables).__name__}: give a dict of the template's "
            'variables, such as {"enable_thinking": False}'
        )


def _read_json(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"{name}={_short(value)} is text, but no JSON ({error}): give JSON, or its value"
            ) from None
    if name == "tools" and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return [_read_json(f"tools[{index}]", one) for index, one in enumerate(value)]
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def choose_prompt(draft: Draft, plan: PreparePlan, tokenizer: Any) -> None:
    """Find the prompt among the row's columns: embeddings and token ids as they are, messages and text as text.

    Raises:
        KeyError: where there is none, or none that the plan can take.
        TypeError, ValueError: for one that cannot be read; and whatever the chat template raises.
    """
    columns = draft.asked
    refuse_arguments(multimodal_data=columns.get("multimodal_data"))
    if plan.task == "score" and is_pair(columns) and not plan.skip_tokenizer:
        return
    if plan.prompt_embeds and columns.get(EMBEDS_COLUMN) is not None:
        draft.embeds = as_embeds(columns[EMBEDS_COLUMN])
        draft.token_ids = np.zeros(len(draft.embeds), dtype=np.int32)
        draft.prompt = columns.get("prompt")
        return
    given = {name for name in ("messages", "prompt", "tokenized_prompt") if columns.get(name) is not None}
    prefer_ids = not plan.tokenize or plan.skip_tokenizer or given == {"tokenized_prompt"}
    if "tokenized_prompt" in given and prefer_ids:
        draft.token_ids = _token_array(columns["tokenized_prompt"])
        draft.prompt = columns.get("prompt")
    elif given and plan.skip_tokenizer:
        raise KeyError("the row has text, but skip_tokenizer_init=True leaves the tokenizer out: give tokenized_prompt")
    elif "messages" in given and plan.apply_chat_template:
        draft.templated = True
        draft.prompt = render_chat(
            tokenizer,
            columns["messages"],
            chat_template=plan.chat_template,
            chat_template_kwargs={**plan.chat_template_kwargs, **(columns.get("chat_template_kwargs") or {})},
            tools=columns.get("tools"),
        )
    elif "prompt" in given:
        draft.prompt = _text(columns["prompt"])
    else:
        raise KeyError(_missing_prompt(columns, given))


def choose_adapter(draft: Draft, plan: PreparePlan) -> None:
    """Take the row's `model` column, where it names another model than the job's, as the name of an adapter."""
    name = draft.asked.get("model")
    if name is None or name == plan.adapters_of:
        return
    if not isinstance(name, str):
        raise TypeError(f"model={name!r} is a {type(name).__name__}: give the name of an adapter")
    place = place_of_adapter(name, plan.adapters or "", plan.adapter_sources)
    draft.lora_request, draft.lora_root = LoRARequest(name, lora_path=place.path), place.root


def _missing_prompt(columns: Row, given: set[str]) -> str:
    if "messages" in given:
        return "the row has messages, but the chat template stage is off: switch it on or give prompt"
    if columns.get(EMBEDS_COLUMN) is not None:
        return f"the row has {EMBEDS_COLUMN}: set engine_kwargs={{'enable_prompt_embeds': True}} to have them taken"
    return (
        f"the row has none of messages, prompt, tokenized_prompt, only {', '.join(columns)}: "
        "let preprocess return one of them"
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"prompt={value!r} is a {type(value).__name__}: give text")
    return value


def _token_array(value: object) -> np.ndarray[Any, Any]:
    remedy = "give a list of token ids (whole numbers from 0 on)"
    token_ids = np.asarray(value)
    if token_ids.ndim != 1 or token_ids.size == 0 or token_ids.dtype.kind not in "iu":
        raise TypeError(f"tokenized_prompt={value!r} is not valid: {remedy}")
    if token_ids.min() < 0 or token_ids.max() >= 2**31:
        raise ValueError(f"tokenized_prompt={value!r} is not valid: {remedy}")
    return token_ids.astype(np.int32)
