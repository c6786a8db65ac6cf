"""A processor's stages, to be looked at: by Ray Data LLM's names, what each is made of and how Ray runs it.

Owns names and descriptions alone. Here the stages lie in three operators (`prepare`, `replica`, `finish`), which can be
asked for by their names too; how these run is the processor's matter, and what is written into a stage changes nothing.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydata_llm.config import EngineProcessorConfig
    from raydata_llm.stage_config import StageConfig

_READS = {
    "messages": "a conversation, for the chat template",
    "prompt": "text, where there are no messages or the chat template stage is off",
    "tokenized_prompt": "token ids, where there is neither or the tokenise stage is off",
    "prompt_embeds": "a matrix, [tokens, hidden_size]; with engine_kwargs={'enable_prompt_embeds': True}",
    "sampling_params": "optional: a dict of sampling parameters",
    "tools, chat_template_kwargs": "optional: function schemas, and a dict of the chat template's variables",
    "data_1, data_2": "the two texts of a pair, for task_type='score'",
    "pooling_params, tokenization_kwargs": "optional: dicts, for pooling models",
}
_OPERATORS = {
    "prepare": "preprocess, chat template and tokeniser, as tasks",
    "replica": "a dispatcher, and the engines that it feeds, each in an actor",
    "finish": "detokeniser and postprocess, as tasks",
}
_FIRST_COLUMN = {"ChatTemplateStage": "messages", "TokenizeStage": "prompt", "vLLMEngineStage": "tokenized_prompt"}


@dataclass(kw_only=True)
class Stage:
    """One stage, or one operator.

    Args:
        name: Ray Data LLM's name of the stage, or "prepare", "replica" or "finish".
        operator: The operator that it lies in.
        does: What happens in that operator.
        fn_constructor_kwargs: What the stage is made of, by Ray Data LLM's names.
        resources: Ray's options of the stage's tasks, or of the engines' actors.
        pool: Smallest and largest number of engines; None of tasks.
        blocks_in_flight: Of an engine, where the config says so.
    """

    name: str
    operator: str
    does: str
    fn_constructor_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    resources: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pool: tuple[int, int] | None = None
    blocks_in_flight: int | None = None

    @functools.cached_property
    def map_batches_kwargs(self) -> dict[str, Any]:
        """How Ray runs it, by Ray Data LLM's names; `compute` is a pool of actors where it runs in one."""
        kwargs = dict(self.resources)
        if self.pool is not None:
            from ray.data import ActorPoolStrategy  # imported when it is asked for: a processor is built without Ray

            smallest, largest = self.pool
            kwargs["compute"] = ActorPoolStrategy(
                min_size=smallest, max_size=largest, max_tasks_in_flight_per_actor=self.blocks_in_flight
            )
        return kwargs

    def get_required_input_keys(self) -> dict[str, str]:
        """The column that a row has for this stage, if no other leads to the prompt, and what it holds."""
        column = _FIRST_COLUMN.get(self.name)
        return {} if column is None else {column: _READS[column]}

    def get_optional_input_keys(self) -> dict[str, str]:
        """Further columns that it looks for."""
        return {name: meaning for name, meaning in _READS.items() if name not in self.get_required_input_keys()}


def stages_of(config: EngineProcessorConfig, chat_template_kwargs: Mapping[str, Any] | None) -> OrderedDict[str, Stage]:
    """The stages that are on, by Ray Data LLM's names, in order.

    Args:
        chat_template_kwargs: The processor's, where the stage has none of its own.
    """
    chat, tokenize, detokenize = config.chat_template_options, config.tokenize_options, config.detokenize_options
    trust = config.engine_config().trust_remote_code
    stages = []
    if chat.enabled:
        of_chat = {
            **_tokenizer_of(config, chat, trust),
            "chat_template": chat.chat_template,
            "chat_template_kwargs": chat.chat_template_kwargs or chat_template_kwargs,
        }
        stages.append(_text_stage("ChatTemplateStage", "prepare", of_chat, config, chat))
    if tokenize.enabled:
        of_tokens = _tokenizer_of(config, tokenize, trust)
        stages.append(_text_stage("TokenizeStage", "prepare", of_tokens, config, tokenize))
    stages.append(_engine_stage(config))
    if detokenize.enabled:
        of_text = _tokenizer_of(config, detokenize, trust)
        stages.append(_text_stage("DetokenizeStage", "finish", of_text, config, detokenize))
    return OrderedDict((stage.name, stage) for stage in stages)


def find_stage(stages: Mapping[str, Stage], name: str) -> Stage:
    """One stage that is on, or one operator, by its name.

    Raises:
        ValueError: for an unknown name.
    """
    if name in stages:
        return stages[name]
    if name in _OPERATORS:
        return Stage(name=name, operator=name, does=_OPERATORS[name])
    raise ValueError(f"name={name!r} is not a stage that is on: choose one of {', '.join([*stages, *_OPERATORS])}")


def input_columns() -> str:
    """The columns that a row may have for the first operator, a line each."""
    lines = "".join(f"\n  {name}: {meaning}" for name, meaning in _READS.items())
    return f"Columns that preprocess returns, or the dataset has:{lines}"


def _tokenizer_of(config: EngineProcessorConfig, stage: StageConfig, trust: bool) -> dict[str, Any]:
    return {"model": stage.model_source or config.model_source, "trust_remote_code": trust}


def _text_stage(
    name: str, operator: str, kwargs: dict[str, Any], config: EngineProcessorConfig, stage: StageConfig
) -> Stage:
    asked = {
        "batch_size": stage.batch_size or config.batch_size,
        "concurrency": stage.concurrency,
        "num_cpus": stage.num_cpus,
        "memory": stage.memory,
        "runtime_env": stage.runtime_env or config.runtime_env,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    does = _OPERATORS[operator]
    return Stage(name=name, operator=operator, does=does, fn_constructor_kwargs=kwargs, resources=given)


def _engine_stage(config: EngineProcessorConfig) -> Stage:
    kwargs = {
        "batch_size": config.batch_size,
        "max_concurrent_batches": config.max_concurrent_batches,
        "model": config.model_source,
        "engine_kwargs": dict(config.engine_kwargs),
        "task_type": config.task_type,
        "max_pending_requests": config.max_pending_requests,
        "dynamic_lora_loading_path": config.dynamic_lora_loading_path,
        "should_continue_on_error": config.should_continue_on_error,
        "log_engine_metrics": config.log_engine_metrics,
    }
    resources = {"accelerator_type": config.accelerator_type, "runtime_env": config.runtime_env}
    return Stage(
        name="vLLMEngineStage",
        operator="replica",
        does=_OPERATORS["replica"],
        fn_constructor_kwargs=kwargs,
        resources=resources,
        pool=config.pool_bounds,
        blocks_in_flight=config.max_tasks_in_flight_per_actor or config.max_concurrent_batches,
    )
