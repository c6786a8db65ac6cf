"""How one text stage of a processor runs, under Ray Data LLM's names.

Owns the stages' fields. The chat template and the tokeniser run in the `prepare` operator, the detokeniser in `finish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import model_validator

from raydata_llm.config_model import ConfigModel, Flag, PositiveInt, PositiveNumber, Share
from raydata_llm.redaction import masked_logger

logger = masked_logger(__name__)

Stage = TypeVar("Stage", bound="StageConfig")


class StageConfig(ConfigModel):
    """What all stages have in common.

    Args:
        enabled: Whether the stage runs.
        model_source: Where its tokenizer comes from; None takes the processor's model.
        num_cpus: CPUs of one task of the operator.
        memory: Bytes of one task of the operator.
        concurrency: Tasks of the operator at once at most (of a pair, the second counts).
        batch_size: Accepted for compatibility: the processor's `batch_size` sizes all blocks.
        runtime_env: Of the operator's tasks; None takes the processor's.
    """

    enabled: Flag = True
    model_source: str | None = None
    num_cpus: Share | None = None
    memory: PositiveNumber | None = None
    concurrency: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    batch_size: PositiveInt | None = None
    runtime_env: dict[str, Any] | None = None


class ChatTemplateStageConfig(StageConfig):
    """How `messages` become a prompt.

    Args:
        chat_template: A Jinja template instead of the model's own.
        chat_template_kwargs: Values handed to the template, such as `enable_thinking` or `tools`.
    """

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizerStageConfig(StageConfig):
    """How a prompt becomes token ids; off, a row's `tokenized_prompt` is taken first."""


class DetokenizeStageConfig(StageConfig):
    """How output token ids become text; off, a row's `sampling_params.detokenize` decides."""


class PrepareMultimodalStageConfig(StageConfig):
    """Images, audio and video in messages: accepted switched off, as this engine reads text.

    Args:
        model_config_kwargs, chat_template_content_format, apply_sys_msg_formatting: Without meaning while it is off.
    """

    model_config_kwargs: dict[str, Any] | None = None
    chat_template_content_format: Literal["string", "openai"] | None = "string"
    apply_sys_msg_formatting: bool | None = False

    @model_validator(mode="after")
    def _check_off(self) -> PrepareMultimodalStageConfig:
        if self.enabled:
            raise ValueError("prepare_multimodal_stage is not supported yet: set it to False, or enabled=False in it")
        return self


_STAGES: dict[str, type[StageConfig]] = {
    "chat_template_stage": ChatTemplateStageConfig,
    "tokenize_stage": TokenizerStageConfig,
    "detokenize_stage": DetokenizeStageConfig,
    "prepare_multimodal_stage": PrepareMultimodalStageConfig,
}


# Fields of older versions: the stage that each is about, and what it says of it.
_OLDER_NAMES = {
    "apply_chat_template": ("chat_template_stage", "enabled"),
    "chat_template": ("chat_template_stage", "chat_template"),
    "tokenize": ("tokenize_stage", "enabled"),
    "detokenize": ("detokenize_stage", "enabled"),
}


def fold_older_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's fields with what its older ones say of stages in the stages, unless these are given themselves."""
    folded, of_stages = dict(values), dict[str, dict[str, Any]]()
    for old, (stage, name) in _OLDER_NAMES.items():
        if values.get(old) is None:
            continue
        if stage in values:
            logger.warning("%s is left out, as %s is given", old, stage)
        else:
            of_stages.setdefault(stage, {})[name] = values[old]
    return folded | of_stages


def check_stage(value: object, field: str) -> object:
    """What a processor's field of a stage holds: the flag, the dict or the stage config that was given, as Ray's.

    Raises:
        ValueError: for anything else, and a dict that makes no stage.
    """
    kind = _STAGES[field]
    if isinstance(value, dict):
        stage = kind(**value)
        # The stage's own, which does not show its variables.
        return value if value.get("runtime_env") is None else {**value, "runtime_env": stage.runtime_env}
    if isinstance(value, bool):
        kind(enabled=value)
    elif type(value) is not kind:
        raise ValueError(f"{field}={value!r} is not valid: give True, False, a dict or {kind.__name__}")
    return value


def stage_of(value: object, kind: type[Stage]) -> Stage:
    """The stage that a processor's field, which was checked, asks for."""
    if isinstance(value, kind):
        return value
    assert isinstance(value, (bool, dict)), "the field's validator lets nothing else in"
    return kind(**value) if isinstance(value, dict) else kind(enabled=value)
