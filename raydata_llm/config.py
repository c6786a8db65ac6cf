"""What a user says about a processor: frozen, checked when it is written down, before Ray or a model is touched.

Owns names, types and ranges and turns every mistake into one line that names field, value and remedy. Knows no
tensors and imports neither Ray nor torch: the engine's own settings are checked by `EngineConfig`, which is plain data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from raydata_llm.adapter_names import check_sources
from raydata_llm.config_model import MOST_COUNT, ConfigModel, Flag, Fraction, PositiveInt, Seconds
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.regular_file import shown as shown_value
from raydata_llm.pooled_rows import TASK_TYPES, TaskType
from raydata_llm.redaction import redact
from raydata_llm.replica_resources import bundle_resources, placement_group
from raydata_llm.resume_config import ResumeConfig
from raydata_llm.stage_config import (
    ChatTemplateStageConfig,
    DetokenizeStageConfig,
    PrepareMultimodalStageConfig,
    TokenizerStageConfig,
    check_stage,
    fold_older_names,
    stage_of,
)
from raydata_llm.store_address import check_bucket
from raydata_llm.vllm_settings import split_vllm_settings

# What Ray runs of actors in a cluster.
_MOST_REPLICAS = 40_000


class ProcessorConfig(ConfigModel):
    """What all processors have in common.

    Args:
        batch_size: Rows of one block. None: 256, more in pools of dozens of replicas.
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
                f"concurrency={shown_value(value)} is not valid: give a number of replicas from 1 to {_MOST_REPLICAS}, "
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
        task_type: "generate", or of a pooling model "embed", "classify" or "score".
        runtime_env: Of all tasks and replicas.
        resources_per_bundle: What Ray reserves for a replica, such as {"GPU": 1, "CPU": 2, "my_resource": 0.1}; None:
            a GPU where it runs on one, nothing else.
        max_concurrent_batches: Blocks in flight a replica; None keeps at least 4096 rows and 16 times the
            engines' `max_num_seqs` in flight, from which all replicas draw.
        max_tasks_in_flight_per_actor: The same; it counts where both are given.
        max_pending_requests: Rows a replica holds at once at most, instead of one and a half times what its engine
            runs at once; 0 or less means no limit of its own.
        hang_timeout_s: An engine that has rows and ends no step for so long counts as hung and is replaced.
        placement_timeout_s: The job stops when no replica has found a place on the cluster by then; raise it where
            nodes are added on demand.
        should_continue_on_error: Turn a row that fails in any stage into a row with `__inference_error__` set; off,
            the first such row stops the job.
        max_error_fraction: With `should_continue_on_error`: the share of rows that may fail, such as 0.1; past it the
            job stops, as one whose template is broken would fail row by row. None: any.
        preserve_order: Give rows back in the order in which they came, as Ray Data's option does for a whole job.
        resume: Let a job that is run again skip the rows that this package's sinks have written to `resume.path`.
        chat_template_stage: True, False, a dict or a `ChatTemplateStageConfig`.
        tokenize_stage: True, False, a dict or a `TokenizerStageConfig`.
        detokenize_stage: True, False, a dict or a `DetokenizeStageConfig`.
        apply_chat_template: Older name for `chat_template_stage=True|False`.
        chat_template: Older name for `chat_template_stage={"chat_template": ...}`.
        tokenize: Older name for `tokenize_stage`.
        detokenize: Older name for `detokenize_stage`.
        log_engine_metrics: Export the job's figures as Prometheus metrics, at the metrics ports of Ray's nodes.
        dynamic_lora_loading_path: The folder, or the address, of the LoRA adapters that rows name in their `model`
            column, with `engine_kwargs={"enable_lora": True}`. A row names folders below it, and no other place.
        allowed_lora_sources: Other places that the `model` column may name: Hub organisations ("org") and repositories
            ("org/name"), absolute folders and addresses ("s3://bucket/adapters") with all that is below them; "*"
            allows any place, for rows that are trusted.
        report_path: A local or remote folder; each run leaves its report there, a page and the same as JSON.
    """

    model_source: str
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    task_type: TaskType = "generate"
    runtime_env: dict[str, Any] | None = None
    resources_per_bundle: dict[str, float] | None = None
    max_concurrent_batches: PositiveInt | None = None
    max_tasks_in_flight_per_actor: PositiveInt | None = None
    max_pending_requests: Annotated[int, Field(strict=True, ge=-MOST_COUNT, le=MOST_COUNT)] | None = None
    hang_timeout_s: Seconds = 600.0
    placement_timeout_s: Seconds = 30.0
    should_continue_on_error: Flag = False
    max_error_fraction: Fraction | None = None
    preserve_order: Flag = False
    resume: ResumeConfig | None = None
    chat_template_stage: bool | dict[str, Any] | ChatTemplateStageConfig = True
    tokenize_stage: bool | dict[str, Any] | TokenizerStageConfig = True
    detokenize_stage: bool | dict[str, Any] | DetokenizeStageConfig = True
    apply_chat_template: Flag | None = None
    chat_template: str | None = None
    tokenize: Flag | None = None
    detokenize: Flag | None = None
    log_engine_metrics: Flag = True
    dynamic_lora_loading_path: str | None = None
    allowed_lora_sources: list[str] = Field(default_factory=list)
    report_path: str | None = None

    @field_validator("model_source", mode="before")
    @classmethod
    def _check_model_source(cls, value: object) -> object:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError(
                f"model_source={value!r} is not valid: give a Hub id, a local folder, a GGUF file or an s3:// folder"
            )
        return os.fspath(value)

    @field_validator("task_type", mode="before")
    @classmethod
    def _check_task_type(cls, value: object) -> object:
        if value not in TASK_TYPES:
            raise ValueError(f"task_type={value!r} is not valid: choose one of {', '.join(TASK_TYPES)}")
        return value

    @field_validator("report_path", mode="before")
    @classmethod
    def _check_report_path(cls, value: object) -> object:
        if isinstance(value, (str, os.PathLike)):
            value = os.fspath(value)
            check_bucket("report_path", redact(str(value)))
        return value

    @field_validator("allowed_lora_sources", mode="before")
    @classmethod
    def _check_lora_sources(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)) or not all(isinstance(source, str) for source in value):
            raise ValueError(f"allowed_lora_sources={value!r} is not valid: give a list such as ['org', '/adapters']")
        check_sources(tuple(value))
        return value

    @field_validator("resume", mode="before")
    @classmethod
    def _check_resume(cls, value: object) -> object:
        if isinstance(value, (str, os.PathLike)):
            raise ValueError(f"resume={os.fspath(value)!r} is not valid: give ResumeConfig({os.fspath(value)!r})")
        return value

    @field_validator("resources_per_bundle", mode="before")
    @classmethod
    def _check_resources(cls, value: object, info: Any) -> object:
        return None if value is None else bundle_resources(value, info.field_name)

    @field_validator("chat_template_stage", "tokenize_stage", "detokenize_stage", mode="before")
    @classmethod
    def _check_stage(cls, value: object, info: Any) -> object:
        return check_stage(value, info.field_name)

    @model_validator(mode="before")
    @classmethod
    def _fold_older_names(cls, values: Any) -> Any:
        return fold_older_names(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_together(self) -> EngineProcessorConfig:
        if self.max_error_fraction is not None and not self.should_continue_on_error:
            raise ValueError(
                f"max_error_fraction={self.max_error_fraction} needs should_continue_on_error=True: without it the "
                "first row that fails stops the job"
            )
        runner = self.engine_kwargs.get("runner")
        if runner not in (None, "auto", "generate" if self.task_type == "generate" else "pooling"):
            raise ValueError(
                f"engine_kwargs['runner']={runner!r} does not fit task_type={self.task_type!r}: leave the runner out"
            )
        if self.engine_config().enable_lora and self.task_type != "generate":
            raise ValueError(
                f"engine_kwargs['enable_lora']=True is not supported with task_type={self.task_type!r}: merge the "
                "adapter into its model"
            )
        for name in ("dynamic_lora_loading_path", "allowed_lora_sources"):
            if getattr(self, name) and not self.engine_config().enable_lora:
                value = getattr(self, name)
                raise ValueError(f"{name}={value!r} needs engine_kwargs={{'enable_lora': True}}")
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
        return EngineConfig.from_mapping(self.model_source, self.engine_settings)

    @property
    def engine_settings(self) -> dict[str, Any]:
        """`engine_kwargs`, with what the task says."""
        if self.task_type == "generate":
            return self.engine_kwargs
        settings = {"runner": "pooling", **self.engine_kwargs}
        return {"convert": "embed", **settings} if self.task_type == "embed" else settings

    @property
    def replica_resources(self) -> Mapping[str, float] | None:
        """What Ray reserves for a replica of one rank, if the user says it."""
        return self.replica_bundles[0] if self.replica_bundles else None

    @property
    def replica_bundles(self) -> Sequence[Mapping[str, float]] | None:
        """What Ray reserves for each rank of a replica, or for all alike, if the user says it."""
        return None if self.resources_per_bundle is None else [self.resources_per_bundle]

    @property
    def placement_strategy(self) -> str:
        """How a replica's ranks are spread over nodes."""
        return "PACK"

    @property
    def chat_template_options(self) -> ChatTemplateStageConfig:
        """The chat template stage."""
        return stage_of(self.chat_template_stage, ChatTemplateStageConfig)

    @property
    def tokenize_options(self) -> TokenizerStageConfig:
        """The tokenise stage."""
        return stage_of(self.tokenize_stage, TokenizerStageConfig)

    @property
    def detokenize_options(self) -> DetokenizeStageConfig:
        """The detokenise stage."""
        return stage_of(self.detokenize_stage, DetokenizeStageConfig)


class vLLMEngineProcessorConfig(EngineProcessorConfig):
    """`EngineProcessorConfig` under Ray Data LLM's name, with all fields of that and vLLM's `engine_kwargs`.

    Settings of vLLM that cannot change an answer are left out with one warning; those that would and that this engine
    does not have are refused; a name that neither knows is a mistake.

    Args:
        prepare_multimodal_stage: False, or a stage that is switched off.
        placement_group_config: {"bundle_per_worker": {...}} or {"bundles": [{...}]}, as `resources_per_bundle`.
    """

    prepare_multimodal_stage: bool | dict[str, Any] | PrepareMultimodalStageConfig = False
    placement_group_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _take_vllm_settings(cls, values: Any) -> Any:
        return split_vllm_settings(values) if isinstance(values, dict) else values

    @field_validator("prepare_multimodal_stage", mode="before")
    @classmethod
    def _check_multimodal(cls, value: object, info: Any) -> object:
        return check_stage(value, info.field_name)

    @field_validator("placement_group_config", mode="before")
    @classmethod
    def _check_placement(cls, value: object) -> object:
        return None if value is None else placement_group(value)

    @model_validator(mode="after")
    def _check_one_placement(self) -> vLLMEngineProcessorConfig:
        if self.placement_group_config is not None and self.resources_per_bundle is not None:
            raise ValueError("placement_group_config says the same as resources_per_bundle: give one of them")
        return self

    @property
    def replica_bundles(self) -> Sequence[Mapping[str, float]] | None:
        """As the base's, from the placement group too."""
        if self.placement_group_config is None:
            return super().replica_bundles
        per_worker, bundles = self.placement_group_config["bundle_per_worker"], self.placement_group_config["bundles"]
        return [per_worker] if bundles is None else list(bundles)

    @property
    def placement_strategy(self) -> str:
        """As the base's, from the placement group too."""
        return str((self.placement_group_config or {}).get("strategy", super().placement_strategy))

    @model_validator(mode="after")
    def _check_bundles(self) -> vLLMEngineProcessorConfig:
        given, num_ranks = len(self.replica_bundles or [0]), self.engine_config().num_ranks
        if given not in (1, num_ranks):
            raise ValueError(
                f"placement_group_config has {given} bundles, and tensor_parallel_size times pipeline_parallel_size "
                f"is {num_ranks}: give one bundle for each rank, or bundle_per_worker"
            )
        return self


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_REPLICAS
