"""Every number that a user can set: what no job can mean is refused where it is written down."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raydata_llm import EngineProcessorConfig, build_llm_processor
from raydata_llm.config import ProcessorConfig, vLLMEngineProcessorConfig
from raydata_llm.config_model import ConfigModel
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.resume_config import ResumeConfig
from raydata_llm.sink_limits import FileLimits
from raydata_llm.stage_config import (
    ChatTemplateStageConfig,
    DetokenizeStageConfig,
    PrepareMultimodalStageConfig,
    StageConfig,
    TokenizerStageConfig,
)

CONFIGS: tuple[type[ConfigModel], ...] = (
    ProcessorConfig,
    EngineProcessorConfig,
    vLLMEngineProcessorConfig,
    StageConfig,
    ChatTemplateStageConfig,
    TokenizerStageConfig,
    DetokenizeStageConfig,
    PrepareMultimodalStageConfig,
)
NEEDED: dict[type, dict[str, Any]] = {
    EngineProcessorConfig: {"model_source": "m", "should_continue_on_error": True},
    vLLMEngineProcessorConfig: {"model_source": "m", "should_continue_on_error": True},
    PrepareMultimodalStageConfig: {"enabled": False},
    EngineConfig: {"model": "m"},
    FileLimits: {"file_bytes": 1, "file_seconds": 1.0, "files_at_once": 1},
    ResumeConfig: {"path": "p"},
}
# Where these mean something, they are taken.
MEANT = {
    ("max_model_len", -1): "as long as the KV memory holds",
    ("max_pending_requests", -1): "no limit of its own",
    ("max_pending_requests", 0): "no limit of its own",
    ("num_cpus", 0): "a task that Ray does not count",
    ("steps_ahead", 0): "no step ahead",
    ("max_error_fraction", 0): "none may fail",
    ("seed", -1): "any whole number",
    ("seed", 0): "any whole number",
    ("seed", 10**18 + 10**20): "any whole number",
    ("seed", 10**400): "any whole number",
}
ABSURD: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    10**18 + 10**20,
    10**400,
    1e300,
    True,
    "many",
    "nan",
    [],
    {"a": 1},
)


def is_number(annotation: Any) -> bool:
    """Whether a field takes a number."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        return any(map(is_number, typing.get_args(annotation)[:2]))
    return annotation in (int, float)


def fields() -> Iterator[tuple[type, str]]:
    for config in CONFIGS:
        hints = {name: field.annotation for name, field in config.model_fields.items()}
        yield from ((config, name) for name, hint in hints.items() if is_number(hint))
    for made in (EngineConfig, FileLimits, ResumeConfig):
        hints = typing.get_type_hints(made)
        yield from ((made, field.name) for field in dataclasses.fields(made) if is_number(hints[field.name]))


def make(config: type, **values: Any) -> Any:
    return config(**{**NEEDED.get(config, {}), **values})


def test_the_sweep_finds_the_fields() -> None:
    found = {name for _, name in fields()}
    assert found >= {"batch_size", "concurrency", "hang_timeout_s", "placement_timeout_s", "max_num_seqs", "seed"}
    assert found >= {"max_error_fraction", "num_cpus", "memory", "file_bytes", "file_seconds", "gpu_memory_utilization"}
    assert len(list(fields())) > 40


@pytest.mark.parametrize(("config", "name"), list(fields()), ids=lambda one: getattr(one, "__name__", one))
def test_what_no_field_can_mean_is_refused_by_name_and_value(config: type, name: str) -> None:
    for value in ABSURD:
        if not isinstance(value, (str, list, dict, bool)) and (name, value) in MEANT:
            make(config, **{name: value})
            continue
        with pytest.raises(ValueError) as told:
            make(config, **{name: value})
        message = str(told.value)
        assert name in message and "\n" not in message and len(message) < 500, value
        assert value == 10**400 or isinstance(value, (list, dict, bool)) or str(value)[:6] in message, value


@pytest.mark.parametrize("field", ["resources_per_bundle", "placement_group_config"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 10**19, 10**400, True, "many", None, [1]])
@pytest.mark.parametrize("resource", ["GPU", "CPU", "memory", "mine"])
def test_amounts_of_a_bundle_that_are_none_are_refused(field: str, value: Any, resource: str) -> None:
    bundle: dict[str, Any] = {resource: value}
    given = bundle if field == "resources_per_bundle" else {"bundle_per_worker": bundle}
    with pytest.raises(ValueError, match=rf"{field}.*{resource}.* is not valid: give 0"):
        make(vLLMEngineProcessorConfig, model_source="m", **{field: given})


@pytest.mark.parametrize("option", ["num_cpus", "num_gpus", "memory", "concurrency", "max_retries"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -2, 10**19, True, "many"])
def test_amounts_of_a_functions_tasks_that_are_none_are_refused(
    tiny_model: Callable[..., Any], option: str, value: Any
) -> None:
    config = EngineProcessorConfig(model_source=str(tiny_model("llama")))
    with pytest.raises(ValueError, match=rf"preprocess_map_kwargs\['{option}'\]=.* is not valid: give a"):
        build_llm_processor(config, preprocess_map_kwargs={option: value})


def test_honest_values_are_taken() -> None:
    config = vLLMEngineProcessorConfig(
        model_source="m",
        concurrency=(1, 1000),
        batch_size=4096,
        hang_timeout_s=86_400,
        resources_per_bundle={"CPU": 0.5, "memory": 2**40},
        engine_kwargs={"max_num_seqs": 8192, "max_num_batched_tokens": 1 << 20, "kv_cache_memory_bytes": 100 << 30},
        tokenize_stage={"num_cpus": 0, "memory": "1e9"},
    )
    assert config.tokenize_options.memory == 1e9
