"""Configs: what is taken, what is refused, and in which words."""

from __future__ import annotations

import pickle
import re
import tomllib
from pathlib import Path
from typing import Any

import pydantic
import pytest

import raydata_llm
from raydata_llm import (
    ChatTemplateStageConfig,
    DetokenizeStageConfig,
    EngineProcessorConfig,
    TokenizerStageConfig,
)


def test_a_model_is_all_that_is_needed() -> None:
    config = EngineProcessorConfig(model_source="org/model")
    assert config.pool_bounds == (1, 1) and config.task_type == "generate"
    assert config.chat_template_options.enabled and config.tokenize_options.enabled
    assert config.engine_config().model == "org/model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "EngineProcessorConfig: model_source is missing: give model_source=..."),
        ({"model_source": ""}, "model_source='' is not valid: give a Hub id, a local folder"),
        ({"model_source": 3}, "model_source=3 is not valid"),
        ({"batch_size": -1}, "batch_size=-1 is not valid: input should be greater than or equal to 1"),
        ({"report_path": "s3://"}, "report_path='s3://' names no bucket: give s3://bucket/folder"),
        ({"resume": "s3://b/answers"}, "resume='s3://b/answers' is not valid: give ResumeConfig('s3://b/answers')"),
        ({"batch_size": "8"}, "batch_size='8' is not valid: input should be a valid integer"),
        ({"batch_size": True}, "batch_size=True is not valid"),
        ({"bacth_size": 8}, "bacth_size=8 is not a setting: did you mean batch_size?"),
        ({"concurrency": 0}, "concurrency=0 is not valid: give a number of replicas from 1 to 40000"),
        ({"concurrency": (3, 2)}, "concurrency=(3, 2) is not valid"),
        ({"concurrency": (1, 2, 3)}, "concurrency=(1, 2, 3) is not valid"),
        ({"concurrency": True}, "concurrency=True is not valid"),
        ({"concurrency": 1.5}, "concurrency=1.5 is not valid"),
        ({"task_type": "chat"}, "task_type='chat' is not valid: choose one of generate, embed, classify, score"),
        ({"task_type": "embed", "engine_kwargs": {"runner": "generate"}}, "does not fit task_type='embed'"),
        ({"engine_kwargs": {"runner": "pooling"}}, "does not fit task_type='generate'"),
        ({"engine_kwargs": {"max_num_seq": 8}}, "did you mean max_num_seqs?"),
        ({"engine_kwargs": {"max_model_len": -5}}, "max_model_len=-5 is not valid: give a number of tokens"),
        ({"engine_kwargs": {"device": "cuda:1"}}, "engine_kwargs['device']='cuda:1' is not valid: Ray picks"),
        ({"engine_kwargs": None}, "engine_kwargs=None is not valid: input should be a valid dictionary"),
        ({"chat_template_stage": 3}, "chat_template_stage=3 is not valid: give True, False, a dict or ChatTempl"),
        ({"chat_template_stage": {"enable": True}}, "enable=True is not a setting: did you mean enabled?"),
        ({"detokenize_stage": TokenizerStageConfig()}, "give True, False, a dict or DetokenizeStageConfig"),
        ({"tokenize_stage": {"num_cpus": -1}}, "num_cpus=-1 is not valid"),
        ({"max_concurrent_batches": 0}, "max_concurrent_batches=0 is not valid"),
        ({"should_continue_on_error": "no"}, "should_continue_on_error='no' is not valid"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(fields: dict[str, Any], message: str) -> None:
    given = fields if "model_source" in fields or not fields else {"model_source": "m", **fields}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        EngineProcessorConfig(**given)
    assert "\n" not in str(error.value)


def test_an_autoscaling_pool_may_be_a_list_as_yaml_has_it() -> None:
    fields: dict[str, Any] = {"model_source": "m", "concurrency": [1, 4]}
    assert EngineProcessorConfig(**fields).pool_bounds == (1, 4)


def test_a_config_cannot_be_changed() -> None:
    config = EngineProcessorConfig(model_source="m")
    remedy = "EngineProcessorConfig cannot be changed: make another one, with batch_size=8 among its arguments"
    with pytest.raises(ValueError, match=remedy):
        config.batch_size = 8


@pytest.mark.parametrize(
    ("given", "enabled"),
    [(True, True), (False, False), ({"enabled": False}, False), (ChatTemplateStageConfig(enabled=False), False)],
)
def test_a_stage_is_a_flag_a_dict_or_a_config(given: Any, enabled: bool) -> None:
    assert EngineProcessorConfig(model_source="m", chat_template_stage=given).chat_template_options.enabled is enabled


def test_older_names_set_the_stages() -> None:
    config = EngineProcessorConfig(
        model_source="m", apply_chat_template=False, chat_template="{{ x }}", tokenize=False, detokenize=False
    )
    assert config.chat_template_options == ChatTemplateStageConfig(enabled=False, chat_template="{{ x }}")
    assert config.tokenize_options == TokenizerStageConfig(enabled=False)
    assert config.detokenize_options == DetokenizeStageConfig(enabled=False)
    # As Ray Data LLM's older versions let it be read.
    assert config.tokenize_stage == {"enabled": False}
    assert config.chat_template_stage == {"enabled": False, "chat_template": "{{ x }}"}


def test_a_stage_reads_back_as_it_was_given() -> None:
    given: dict[str, Any] = {
        "chat_template_stage": {"enabled": False, "batch_size": 128, "runtime_env": {"env_vars": {"A": "b"}}},
        "tokenize_stage": TokenizerStageConfig(concurrency=4),
        "detokenize_stage": False,
    }
    config = EngineProcessorConfig(model_source="m", **given)
    assert {name: getattr(config, name) for name in given} == given and isinstance(config.chat_template_stage, dict)
    assert config.chat_template_options.batch_size == 128 and not config.detokenize_options.enabled
    assert (
        EngineProcessorConfig(**config.model_dump(exclude_none=True)).chat_template_options
        == config.chat_template_options
    )


def test_a_stage_that_is_given_itself_counts_more_than_its_older_name(caplog: pytest.LogCaptureFixture) -> None:
    stage = ChatTemplateStageConfig(enabled=False, num_cpus=0.5)
    config = EngineProcessorConfig(model_source="m", chat_template_stage=stage, apply_chat_template=True)
    assert config.chat_template_stage is stage
    assert caplog.messages == ["apply_chat_template is left out, as chat_template_stage is given"]


def test_a_bad_config_is_pydantics_error_too() -> None:
    for make in (
        lambda: EngineProcessorConfig(model_source="m", concurrency=0),
        lambda: TokenizerStageConfig(enabled=3),  # type: ignore[arg-type]
    ):
        with pytest.raises(pydantic.ValidationError) as error:
            make()
        assert isinstance(error.value, ValueError) and "\n" not in str(error.value) and error.value.error_count() == 1
        assert error.value.errors()[0]["msg"] == str(error.value)
        copied = pickle.loads(pickle.dumps(error.value))
        assert type(copied) is type(error.value) and str(copied) == str(error.value)


def test_every_exported_name_is_there() -> None:
    assert all(getattr(raydata_llm, name) is not None for name in raydata_llm.__all__)
    assert set(raydata_llm.__all__) <= set(dir(raydata_llm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raydata_llm.nothing  # noqa: B018


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert raydata_llm.__version__ == project["version"]
