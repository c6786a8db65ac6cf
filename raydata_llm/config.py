"""What a user says about a processor: frozen, checked when it is written down, before Ray or a model is touched.

Owns names, types and ranges and turns every mistake into one line that names field, value and remedy. Knows no
tensors and imports neither Ray nor torch: the engine's own settings are checked by `EngineConfig`, which is plain data.
"""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.redaction import mask_environment, redact, redact_tree
from raydata_llm.resume_config import ResumeConfig
from raydata_llm.vllm_settings import split_vllm_settings

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
Flag = Annotated[bool, Field(strict=True)]
_Stage = TypeVar("_Stage", bound="StageConfig")


class _Config(BaseModel):
    """A frozen model without unknown fields, whose mistakes are plain one-line `ValueError`s."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, mask_environment(value) if name == "runtime_env" else redact_tree(value)

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic derives from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError(_describe(type(self), error)) from None


class StageConfig(_Config):
    """How one text stage runs.

    The chat template and the tokeniser run in the `prepare` operator, the detokeniser in `finish`.

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


class ProcessorConfig(_Config):
    """What all processors have in common.

    Args:
        batch_size: Rows of one block, so of one task of a replica. None: 256 on GPUs, 16 on CPUs.
        concurrency: Replicas: `n` for a fixed pool, `(m, n)` for a pool that grows from m to n.
        accelerator_type: The GPU a replica needs, as Ray names it ("H100", "L4").
    """

    batch_size: PositiveInt | None = None
    concurrency: int | tuple[int, int] = 1
    accelerator_type: str | None = None

    @field_validator("concurrency", mode="before")
    @classmethod
    def _check_concurrency(cls, value: Any) -> Any:
        bounds = list(value) if isinstance(value, (tuple, list)) and len(value) == 2 else [value]
        if not all(_is_count(bound) for bound in bounds) or bounds != sorted(bounds):
            raise ValueError(
                f"concurrency={value!r} is not valid: give a number of replicas from 1 on, "
                "or (m, n) with 1 <= m <= n for a pool that grows from m to n"
            )
        return tuple(bounds) if isinstance(value, (tuple, list)) else value

    @property
    def pool_bounds(self) -> tuple[int, int]:
        """Smallest and largest number of replicas."""
        return self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency, self.concurrency)


class EngineProcessorConfig(ProcessorConfig):
    """A processor whose replicas run this package's engine.

    Args:
        model_source: A Hub id, a local folder, a GGUF file or an `s3://` folder.
        engine_kwargs: Settings of the engine, see `raydata_llm.engine.engine_config.EngineConfig`.
        task_type: "generate".
        runtime_env: Of all tasks and replicas.
        max_concurrent_batches: Blocks a replica works on at once; None queues two to three times its
            `max_num_seqs` rows.
        max_tasks_in_flight_per_actor: Blocks sent to a replica at once, those at work included.
        max_pending_requests: Rows a replica holds at once at most, instead of the multiple of `max_num_seqs`;
            0 or less means no limit of its own.
        should_continue_on_error: Turn a row that fails in any stage into a row with `__inference_error__` set; off,
            the first such row stops the job.
        resume: Let a job that is run again skip the rows that this package's sinks have written to `resume.path`.
        chat_template_stage: True, False, a dict or a `ChatTemplateStageConfig`.
        tokenize_stage: True, False, a dict or a `TokenizerStageConfig`.
        detokenize_stage: True, False, a dict or a `DetokenizeStageConfig`.
        apply_chat_template: Older name for `chat_template_stage=True|False`.
        chat_template: Older name for `chat_template_stage={"chat_template": ...}`.
        tokenize: Older name for `tokenize_stage`.
        detokenize: Older name for `detokenize_stage`.
        log_engine_metrics: Export the job's figures as Prometheus metrics, at the metrics ports of Ray's nodes.
        report_path: A local or remote folder; each run leaves its report there, a page and the same as JSON.
    """

    model_source: str
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    task_type: str = "generate"
    runtime_env: dict[str, Any] | None = None
    max_concurrent_batches: PositiveInt | None = None
    max_tasks_in_flight_per_actor: PositiveInt | None = None
    max_pending_requests: Annotated[int, Field(strict=True)] | None = None
    should_continue_on_error: Flag = False
    resume: ResumeConfig | None = None
    chat_template_stage: bool | dict[str, Any] | ChatTemplateStageConfig = True
    tokenize_stage: bool | dict[str, Any] | TokenizerStageConfig = True
    detokenize_stage: bool | dict[str, Any] | DetokenizeStageConfig = True
    apply_chat_template: Flag | None = None
    chat_template: str | None = None
    tokenize: Flag | None = None
    detokenize: Flag | None = None
    log_engine_metrics: Flag = True
    report_path: str | None = None

    @field_validator("model_source", mode="before")
    @classmethod
    def _check_model_source(cls, value: object) -> object:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError(
                f"model_source={value!r} is not valid: give a Hub id, a local folder, a GGUF file or an s3:// folder"
            )
        return os.fspath(value)

    @field_validator("task_type")
    @classmethod
    def _check_task_type(cls, value: str) -> str:
        if value in ("embed", "classify", "score"):
            raise ValueError(f"task_type={value!r} is not supported yet: only 'generate' is")
        if value != "generate":
            raise ValueError(f"task_type={value!r} is not valid: use 'generate'")
        return value

    @field_validator("chat_template_stage", "tokenize_stage", "detokenize_stage", mode="before")
    @classmethod
    def _check_stage(cls, value: object, info: Any) -> object:
        kind = _STAGES[info.field_name]
        if isinstance(value, bool):
            return kind(enabled=value)
        if isinstance(value, dict):
            return kind(**value)
        if type(value) is not kind:
            raise ValueError(f"{info.field_name}={value!r} is not valid: give True, False, a dict or {kind.__name__}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> EngineProcessorConfig:
        for old, new in _OLDER_NAMES.items():
            if getattr(self, old) is not None and new in self.model_fields_set:
                raise ValueError(f"{old}={getattr(self, old)!r} says the same as {new}: give {new} alone")
        device = self.engine_config().device
        if device.startswith("cuda:"):
            raise ValueError(
                f"engine_kwargs['device']={device!r} is not valid: Ray picks each replica's GPU, give 'cuda'"
            )
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's settings, as far as the driver knows them.

        Raises:
            ValueError: for an unknown name or a bad value in `engine_kwargs`.
        """
        return EngineConfig.from_mapping(self.model_source, self.engine_kwargs)

    @property
    def chat_template_options(self) -> ChatTemplateStageConfig:
        """The chat template stage, older names folded in."""
        changes: dict[str, Any] = {}
        if self.apply_chat_template is not None:
            changes["enabled"] = self.apply_chat_template
        if self.chat_template is not None:
            changes["chat_template"] = self.chat_template
        return _as_stage(self.chat_template_stage, ChatTemplateStageConfig).model_copy(update=changes)

    @property
    def tokenize_options(self) -> TokenizerStageConfig:
        """The tokenise stage, older name folded in."""
        changes = {} if self.tokenize is None else {"enabled": self.tokenize}
        return _as_stage(self.tokenize_stage, TokenizerStageConfig).model_copy(update=changes)

    @property
    def detokenize_options(self) -> DetokenizeStageConfig:
        """The detokenise stage, older name folded in."""
        changes = {} if self.detokenize is None else {"enabled": self.detokenize}
        return _as_stage(self.detokenize_stage, DetokenizeStageConfig).model_copy(update=changes)


class vLLMEngineProcessorConfig(EngineProcessorConfig):
    """`EngineProcessorConfig` under Ray Data LLM's name, taking vLLM's `engine_kwargs`.

    Settings of vLLM that cannot change an answer are left out with one warning; those that would and that this engine
    does not have are refused; a name that neither knows is a mistake.
    """

    @model_validator(mode="before")
    @classmethod
    def _take_vllm_settings(cls, values: Any) -> Any:
        return split_vllm_settings(values, known=set(cls.model_fields)) if isinstance(values, dict) else values


_STAGES: dict[str, type[StageConfig]] = {
    "chat_template_stage": ChatTemplateStageConfig,
    "tokenize_stage": TokenizerStageConfig,
    "detokenize_stage": DetokenizeStageConfig,
}
_OLDER_NAMES = {
    "apply_chat_template": "chat_template_stage",
    "chat_template": "chat_template_stage",
    "tokenize": "tokenize_stage",
    "detokenize": "detokenize_stage",
}


def _as_stage(value: object, kind: type[_Stage]) -> _Stage:
    assert isinstance(value, kind), "the field's validator makes a stage of what is given"
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _describe(config: type[BaseModel], error: ValidationError) -> str:
    return redact("; ".join(_describe_one(config, detail) for detail in error.errors()))


def _describe_one(config: type[BaseModel], detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"][:1])
    if detail["type"] == "value_error":
        return f"{config.__name__}: {detail['ctx']['error']}"
    if detail["type"] == "missing":
        return f"{config.__name__}: {field} is missing: give {field}=..."
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, config.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(config.model_fields))}"
        return f"{config.__name__}: {field}={detail['input']!r} is not a setting: {hint}"
    remedy = str(detail["msg"])
    return f"{config.__name__}: {field}={detail['input']!r} is not valid: {remedy[:1].lower()}{remedy[1:]}"
