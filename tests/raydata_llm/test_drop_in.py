"""Ray Data LLM's public API: its fields, defaults and columns, and vLLM's settings, mean here what they mean there."""

from __future__ import annotations

import importlib
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raydata_llm
from raydata_llm import EngineProcessorConfig, PrepareMultimodalStageConfig, build_processor, vLLMEngineProcessorConfig
from raydata_llm.output_table import OUTPUT_COLUMNS

# Of ray.data.llm 2.44 to 2.60. Defaults that are worked out here from the engine's capacity are left open (...).
FIELDS: dict[str, Any] = {
    "batch_size": ...,
    "accelerator_type": None,
    "concurrency": 1,
    "model_source": "m",
    "runtime_env": None,
    "resources_per_bundle": None,
    "max_pending_requests": None,
    "max_concurrent_batches": ...,
    "max_tasks_in_flight_per_actor": None,
    "should_continue_on_error": False,
    "engine_kwargs": {},
    "task_type": "generate",
    "log_engine_metrics": True,
    "dynamic_lora_loading_path": None,
    "placement_group_config": None,
}
STAGES = {
    "chat_template_stage": True,
    "tokenize_stage": True,
    "detokenize_stage": True,
    "prepare_multimodal_stage": False,
}
STAGE_FIELDS = {"enabled", "batch_size", "concurrency", "runtime_env", "num_cpus", "memory"}
STAGE_CONFIGS = {
    "ChatTemplateStageConfig": STAGE_FIELDS | {"model_source", "chat_template", "chat_template_kwargs"},
    "TokenizerStageConfig": STAGE_FIELDS | {"model_source"},
    "DetokenizeStageConfig": STAGE_FIELDS | {"model_source"},
    "PrepareMultimodalStageConfig": STAGE_FIELDS
    | {"model_config_kwargs", "chat_template_content_format", "apply_sys_msg_formatting"},
}
OLDER_FIELDS: list[dict[str, Any]] = [
    {"apply_chat_template": False},
    {"chat_template": "{{ messages }}"},
    {"tokenize": False},
    {"detokenize": False},
    {"has_image": False},
    {"prepare_image_stage": False},
    {"experimental": {}},
]


def config_of(**fields: Any) -> vLLMEngineProcessorConfig:
    return vLLMEngineProcessorConfig(**{"model_source": "m", **fields})


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_peer_is_there_with_its_default(field: str) -> None:
    assert FIELDS[field] is ... or getattr(config_of(), field) == FIELDS[field]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_the_peer_is_there_on_or_off_as_there(stage: str) -> None:
    assert getattr(config_of(), stage) is STAGES[stage]
    assert getattr(config_of(**{stage: {"enabled": False, "num_cpus": 0.5}}), stage)["num_cpus"] == 0.5


@pytest.mark.parametrize("name", STAGE_CONFIGS)
def test_a_stages_config_has_the_peers_fields(name: str) -> None:
    config = getattr(raydata_llm, name)
    assert STAGE_CONFIGS[name] <= set(config.model_fields)
    given = {
        "enabled": False,
        "batch_size": 8,
        "concurrency": (1, 4),
        "runtime_env": {},
        "num_cpus": 1.0,
        "memory": 1e9,
    }
    assert config(**given).model_dump(include=set(given)) == given


@pytest.mark.parametrize("fields", OLDER_FIELDS, ids=str)
def test_a_field_that_the_peer_had_once_is_taken(fields: dict[str, Any]) -> None:
    assert isinstance(config_of(**fields), EngineProcessorConfig)


def test_what_became_a_field_of_its_own_is_taken_out_of_experimental(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(experimental={"max_tasks_in_flight_per_actor": 6, "other": 1})
    assert config.max_tasks_in_flight_per_actor == 6 and "experimental['other']" in caplog.text


def test_the_installed_peer_has_no_name_that_is_not_here() -> None:
    peer = pytest.importorskip("ray.data.llm")
    assert set(peer.vLLMEngineProcessorConfig.model_fields) <= set(vLLMEngineProcessorConfig.model_fields)
    for name in STAGE_CONFIGS:
        theirs, ours = getattr(peer, name).model_fields, getattr(raydata_llm, name).model_fields
        assert {field: info.default for field, info in theirs.items()}.items() <= {
            field: info.default for field, info in ours.items()
        }.items()
    other_engines = {"HttpRequest", "SGLangEngine", "ServeDeployment"}
    names = {name for name in peer.__all__ if not name.startswith(tuple(other_engines))}
    assert names <= set(raydata_llm.__all__)


# Those that users pass (and what arrives at the engine); ... for what is left out with a warning.
ENGINE_KWARGS: list[tuple[str, Any, Any]] = [
    ("tensor_parallel_size", 1, 1),
    ("pipeline_parallel_size", 1, 1),
    ("data_parallel_size", 1, None),
    ("max_model_len", 4096, 4096),
    ("max_num_batched_tokens", 8192, 8192),
    ("max_num_seqs", 256, 256),
    ("enable_chunked_prefill", True, True),
    ("enable_prefix_caching", False, False),
    ("enforce_eager", True, True),
    ("gpu_memory_utilization", 0.8, 0.8),
    ("dtype", "half", "half"),
    ("trust_remote_code", True, True),
    ("load_format", "dummy", "dummy"),
    ("seed", 3, 3),
    ("skip_tokenizer_init", True, True),
    ("distributed_executor_backend", "ray", ...),
    ("enable_lora", False, False),
    ("enable_lora", True, True),
    ("max_lora_rank", 32, 32),
    ("max_loras", 4, 4),
    ("guided_decoding_backend", "xgrammar", ...),
    ("structured_outputs_config", {"backend": "auto"}, ...),
    ("reasoning_parser", "qwen3", "qwen3"),
    ("pooler_config", {"pooling_type": "CLS"}, {"pooling_type": "CLS"}),
    ("limit_mm_per_prompt", {"image": 1}, ...),
    ("disable_log_stats", True, ...),
    ("quantization", None, None),
    ("quantization", "gguf", None),
    ("kv_cache_dtype", "fp8", ...),
    ("tokenizer_mode", "auto", None),
    ("model", "other", ...),
    ("swap_space", 4, ...),
    ("cpu_offload_gb", 10, ...),
    ("compilation_config", 3, ...),
    ("speculative_config", {"method": "ngram"}, ...),
    ("task_type", "generate", None),
    ("hf_overrides", None, None),
    ("enable_prefix_caching", None, None),
]


@pytest.mark.parametrize(("name", "value", "arrives"), ENGINE_KWARGS, ids=str)
def test_a_setting_of_vllm_is_taken(name: str, value: Any, arrives: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = config_of(engine_kwargs={name: value})
    assert config.engine_kwargs == ({} if arrives in (None, ...) else {name: arrives})
    assert [name in message for message in caplog.messages] == ([True] if arrives is ... else [])


@pytest.mark.parametrize(
    ("given", "arrives"),
    [
        ({"structured_outputs_config": {"reasoning_parser": "qwen3"}}, {"reasoning_parser": "qwen3"}),
        (
            {"structured_outputs_config": {"reasoning_parser": "qwen3"}, "reasoning_parser": "mistral"},
            {"reasoning_parser": "mistral"},
        ),
        (
            {"structured_outputs_config": {"reasoning_parser": "qwen3", "enable_in_reasoning": True}},
            {"reasoning_config": {"reasoning_parser": "qwen3"}},
        ),
        ({"structured_outputs_config": {"enable_in_reasoning": False, "disable_any_whitespace": False}}, {}),
        (
            {"structured_outputs_config": {"disable_any_whitespace": True, "backend": "xgrammar"}},
            {"structured_outputs_config": {"disable_any_whitespace": True}},
        ),
        (
            {"guided_decoding_disable_additional_properties": True},
            {"structured_outputs_config": {"disable_additional_properties": True}},
        ),
    ],
)
def test_what_vllm_says_of_forms_is_taken(given: dict[str, Any], arrives: dict[str, Any]) -> None:
    assert config_of(engine_kwargs=given).engine_kwargs == arrives


def test_the_poolers_older_name_is_taken() -> None:
    config = config_of(engine_kwargs={"override_pooler_config": {"pooling_type": "CLS"}}, task_type="embed")
    assert config.engine_kwargs == {"pooler_config": {"pooling_type": "CLS"}}


def test_what_is_left_out_is_said_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"swap_space": 4, "load_format": "runai_streamer", "worker_cls": "my.Worker", "max_num_seqs": 8}
    assert config_of(engine_kwargs=kwargs).engine_kwargs == {"load_format": "auto", "max_num_seqs": 8}
    [warning] = caplog.messages
    assert all(name in warning for name in ("swap_space", "runai_streamer", "worker_cls"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"engine_kwargs": {"quantization": "awq"}}, "quantization='awq' is not supported yet"),
    (
        {"model_source": "/tmp", "engine_kwargs": {"revision": "v2"}},
        "revision='v2' is not valid with model_source='/tmp'",
    ),
    ({"engine_kwargs": {"enable_return_routed_experts": True}}, "the engine runs dense models"),
    ({"engine_kwargs": {"rope_scaling": {"factor": 2}}}, "set hf_overrides"),
    ({"engine_kwargs": {"task": "embed"}}, "task='embed' is not supported yet"),
    ({"engine_kwargs": {"data_parallel_size": 2}}, "data_parallel_size=2 is not supported yet: set concurrency"),
    ({"engine_kwargs": {"hf_token": "hf_canary"}}, "hf_token='***' is not supported yet: set the environment variable"),
    ({"engine_kwargs": {"max_nun_seqs": 8}}, "did you mean max_num_seqs?"),
    ({"has_image": True}, "has_image=True is not supported yet"),
    ({"prepare_multimodal_stage": True}, "prepare_multimodal_stage is not supported yet: set it to False"),
    ({"prepare_multimodal_stage": 3}, "give True, False, a dict or PrepareMultimodalStageConfig"),
    (
        {"engine_kwargs": {"enable_lora": True}, "task_type": "embed"},
        "engine_kwargs['enable_lora']=True is not supported with task_type='embed'",
    ),
    ({"dynamic_lora_loading_path": "s3://b/l"}, "dynamic_lora_loading_path='s3://b/l' needs engine_kwargs"),
    ({"placement_group_config": {"strategy": "PACK"}}, "give one of bundle_per_worker and bundles"),
    ({"placement_group_config": {"bundle_per_worker": {"GPU": -1}}}, "bundle['GPU']=-1 is not valid: give 0"),
    (
        {"placement_group_config": {"bundles": [{"GPU": 1}, {"GPU": 1}]}},
        "has 2 bundles, and tensor_parallel_size",
    ),
    ({"placement_group_config": {"bundle_per_worker": {"GPU": 1}, "strategy": "NEAR"}}, "'NEAR' is not valid: choose"),
    ({"resources_per_bundle": {"GPU": 2}}, "resources_per_bundle['GPU']=2 is not supported yet"),
    ({"resources_per_bundle": {}}, "resources_per_bundle={} is not valid: give resources and amounts"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_would_change_answers_or_places_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        config_of(**fields)
    assert "\n" not in str(error.value) and "canary" not in str(error.value)


def test_only_the_peers_name_takes_vllms_settings() -> None:
    with pytest.raises(ValueError, match="swap_space"):
        EngineProcessorConfig(model_source="m", engine_kwargs={"swap_space": 4})


@pytest.mark.parametrize(
    "fields",
    [
        {"resources_per_bundle": {"GPU": 1, "spot": 0.5}},
        {"placement_group_config": {"bundle_per_worker": {"GPU": 1, "spot": 0.5}}},
        {"placement_group_config": {"bundles": [{"GPU": 1, "spot": 0.5}], "strategy": "STRICT_PACK"}},
    ],
    ids=str,
)
def test_all_ways_to_say_what_a_replica_takes_are_one(fields: dict[str, Any]) -> None:
    assert config_of(**fields).replica_resources == {"GPU": 1.0, "spot": 0.5}
    with pytest.raises(ValueError, match="says the same as resources_per_bundle"):
        config_of(placement_group_config={"bundle_per_worker": {"GPU": 1}}, resources_per_bundle={"GPU": 1})


def test_a_config_may_stand_in_a_yaml_file(tmp_path: Path) -> None:
    text = "model_source: m\nconcurrency: [1, 4]\nengine_kwargs: {max_num_seqs: 8}\ntokenize_stage: {num_cpus: 0.5}\n"
    (tmp_path / "job.yaml").write_text(text)
    config = vLLMEngineProcessorConfig.from_file(str(tmp_path / "job.yaml"))
    assert config == vLLMEngineProcessorConfig.parse_yaml(io.StringIO(text))
    assert config.pool_bounds == (1, 4) and config.tokenize_options.num_cpus == 0.5
    with pytest.raises(ValueError, match="the YAML is a list: give a mapping of fields to values"):
        vLLMEngineProcessorConfig.parse_yaml("- 1")


def test_multimodal_columns_are_prepared_by_nobody_yet() -> None:
    with pytest.raises(ValueError, match="is not supported yet"):
        PrepareMultimodalStageConfig()
    assert not PrepareMultimodalStageConfig(enabled=False).enabled


# What postprocess sees there for vLLM, beside the row's own columns.
PEERS_COLUMNS = """
    prompt prompt_token_ids num_input_tokens generated_tokens generated_text num_generated_tokens embeddings metrics
    logprobs prompt_logprobs request_id batch_uuid time_taken_llm params __inference_error__
"""


@pytest.mark.parametrize("column", PEERS_COLUMNS.split())
def test_postprocess_sees_the_peers_column(column: str) -> None:
    assert column in OUTPUT_COLUMNS  # and test_finish.py holds each row to these


@pytest.mark.parametrize("builder", ["build_processor", "build_llm_processor"])
def test_both_builders_take_the_peers_arguments_by_position(builder: str, tiny_model: Callable[..., Path]) -> None:
    build = getattr(importlib.import_module("raydata_llm"), builder)
    config = vLLMEngineProcessorConfig(model_source=str(tiny_model("llama")))
    options = {"chat_template_kwargs": {"enable_thinking": False}, "telemetry_agent": None}
    processor = build(config, keep, keep, {"num_cpus": 0.5}, {"concurrency": 2}, options)
    assert (processor.config, processor.preprocess, processor.postprocess) == (config, keep, keep)
    assert processor.preprocess_map_kwargs == {"num_cpus": 0.5} and processor.postprocess_map_kwargs == {
        "concurrency": 2
    }
    assert list(processor.stages) == processor.list_stage_names()


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return row


def test_stages_have_the_peers_names_and_what_they_are_made_of(tiny_model: Callable[..., Path]) -> None:
    model, environment = str(tiny_model("llama")), {"env_vars": {"A": "1"}}
    config = config_of(
        model_source=model,
        engine_kwargs={"max_model_len": 128, "swap_space": 4},
        concurrency=(1, 4),
        batch_size=64,
        max_pending_requests=111,
        experimental={"max_tasks_in_flight_per_actor": 10},
        runtime_env=environment,
        chat_template_stage={"num_cpus": 0.5, "chat_template": "{{ x }}"},
    )
    processor = build_processor(config, builder_kwargs={"chat_template_kwargs": {"enable_thinking": False}})
    names = ["ChatTemplateStage", "TokenizeStage", "vLLMEngineStage", "DetokenizeStage"]
    assert processor.list_stage_names() == list(processor.stages) == names
    chat, engine = processor.get_stage_by_name("ChatTemplateStage"), processor.get_stage_by_name("vLLMEngineStage")
    assert chat.fn_constructor_kwargs == {
        "model": model,
        "chat_template": "{{ x }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "trust_remote_code": False,
    }
    assert chat.map_batches_kwargs == {"batch_size": 64, "num_cpus": 0.5, "runtime_env": environment}
    made_of = engine.fn_constructor_kwargs
    assert (made_of["model"], made_of["task_type"], made_of["max_pending_requests"]) == (model, "generate", 111)
    assert made_of["engine_kwargs"] == {"max_model_len": 128}
    pool = engine.map_batches_kwargs["compute"]
    assert (pool.min_size, pool.max_size, pool.max_tasks_in_flight_per_actor) == (1, 4, 10)
    assert engine.map_batches_kwargs["runtime_env"] == environment
    assert [processor.get_stage_by_name(name).operator for name in names] == ["prepare", "prepare", "replica", "finish"]
    assert processor.get_stage_by_name("prepare").operator == "prepare"  # our own names are taken too
    assert list(chat.get_required_input_keys()) == ["messages"] and "env_vars" not in repr(engine)


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({"tokenize": False}, "TokenizeStage"),
        ({"apply_chat_template": False}, "ChatTemplateStage"),
        ({"detokenize": False, "has_image": False}, "DetokenizeStage"),
        ({"tokenize_stage": {"enabled": False}}, "TokenizeStage"),
    ],
    ids=str,
)
def test_a_stage_that_is_off_is_not_there(fields: dict[str, Any], off: str, tiny_model: Callable[..., Path]) -> None:
    processor = build_processor(vLLMEngineProcessorConfig(model_source=str(tiny_model("llama")), **fields))
    names = ["ChatTemplateStage", "TokenizeStage", "vLLMEngineStage", "DetokenizeStage"]
    assert processor.list_stage_names() == [name for name in names if name != off]
    with pytest.raises(ValueError, match=f"name='{off}' is not a stage that is on"):
        processor.get_stage_by_name(off)


def test_a_placement_reads_back_as_given() -> None:
    config = config_of(placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 1}})
    placed = {"bundle_per_worker": {"CPU": 1.0, "GPU": 1.0}, "bundles": None, "strategy": "PACK"}
    assert config.placement_group_config == placed and config_of(**config.model_dump()).placement_group_config == placed


def sized(config: Any) -> Any:
    config.num_hidden_layers = 2
    return config


def test_a_function_of_the_models_config_reaches_replicas_as_values(tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama"))
    kwargs = {"hf_overrides": sized, "load_format": "dummy"}
    processor = build_processor(vLLMEngineProcessorConfig(model_source=model, engine_kwargs=kwargs))
    assert processor.config.engine_kwargs["hf_overrides"] == {"num_hidden_layers": 2}
