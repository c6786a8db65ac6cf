"""Every engine argument of vLLM 0.33: its default is taken, another value is used, refused, or left out with a word."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import LLM, EngineArgs, SamplingParams, vLLMEngineProcessorConfig
from raydata_llm.engine.engine_config import FIELD_NAMES
from raydata_llm.model_source import with_revision
from raydata_llm.vllm_arguments import ARGUMENTS
from raydata_llm.vllm_settings import split_llm_settings
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

# What `LLM` reads itself.
OF_LLM = {"tokenizer", "revision", "tokenizer_revision", "profiler_config", "data_parallel_size", "model"}


@dataclasses.dataclass
class Config:
    """As vLLM's own objects of settings."""

    level: int = 0


@pytest.mark.parametrize("name", ARGUMENTS)
def test_vllms_default_is_taken_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    default = ARGUMENTS[name]
    values = [default, None, *([Config()] if default in ({}, ()) and name not in FIELD_NAMES else [])]
    for value in values:
        if name not in OF_LLM:
            assert split_llm_settings({name: value}).keys() <= {name}
        made = vLLMEngineProcessorConfig(model_source="m", engine_kwargs={} if name == "model" else {name: value})
        assert made.engine_kwargs.keys() <= {name}
    assert not caplog.messages


# Another value of each kind of default.
OTHER: dict[type, Any] = {bool: None, int: 7, float: 0.25, str: "other", dict: {"other": 1}, tuple: ("other",)}


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - FIELD_NAMES - OF_LLM))
def test_another_value_is_refused_with_a_remedy_or_left_out_with_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    default = ARGUMENTS[name]
    other = not default if isinstance(default, bool) else OTHER.get(type(default), ["other"])
    try:
        kept = split_llm_settings({name: other})
    except ValueError as error:
        assert f"{name}=" in str(error) and "is not supported yet: " in str(error) and "\n" not in str(error)
        return
    assert kept == {}
    [warning] = caplog.messages
    assert name in warning


@pytest.mark.parametrize(
    "name",
    [
        *("enable_return_routed_experts", "return_sampling_mask", "watermark_config", "diffusion_config"),
        *("lora_target_modules", "model_weights", "model_class_overrides", "device_ids", "hf_config_path"),
    ],
)
def test_what_would_change_answers_or_results_is_not_left_out(name: str) -> None:
    default = ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"{name}=.* is not supported yet: "):
        split_llm_settings({name: (not default) if isinstance(default, bool) else ["other"]})


def test_the_table_is_whole() -> None:
    assert len(ARGUMENTS) == 259 and [field.name for field in dataclasses.fields(EngineArgs)] == list(ARGUMENTS)


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return str(save_tokenizer(folder))


def test_an_llm_is_made_from_engine_args(model_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    args = EngineArgs(model=model_folder, max_model_len=96, max_num_seqs=4, revision="main")
    with caplog.at_level(logging.WARNING):
        ways = [LLM.from_engine_args(args), LLM(**vars(args)), LLM(**dataclasses.asdict(args))]
    assert not [message for message in caplog.messages if "left out" in message]
    for llm in ways:
        assert llm.model_config.max_model_len == 96
        assert len(llm.generate("hello", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2
        llm.shutdown()


def test_engine_args_come_from_a_command_line() -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    line = ["--model", "m", "--max-model-len", "8k", "--enforce-eager", "--hf-overrides", '{"a": 1}', "--seed", "3"]
    args = EngineArgs.from_cli_args(parser.parse_args(line))
    assert (args.model, args.max_model_len, args.enforce_eager, args.hf_overrides, args.seed) == (
        "m",
        "8k",
        True,
        {"a": 1},
        3,
    )
    assert dataclasses.asdict(EngineArgs.from_cli_args(parser.parse_args([]))) == dataclasses.asdict(EngineArgs())
    with pytest.raises(ValueError, match=r"max_model_length=1 is not an argument of .*did you mean max_model_len"):
        EngineArgs(max_model_length=1)


@pytest.mark.parametrize(
    ("source", "revision", "made"),
    [
        ("org/name", None, "org/name"),
        ("org/name", "main", "org/name"),
        ("org/name", "v2", "org/name@v2"),
        ("org/name@v2", "v2", "org/name@v2"),
        ("s3://bucket/folder", "main", "s3://bucket/folder"),
    ],
)
def test_a_revision_is_of_a_model_on_the_hub(source: str, revision: str | None, made: str) -> None:
    assert with_revision(source, revision) == made
    fields: dict[str, Any] = {"model_source": source, "engine_kwargs": {"revision": revision}}
    assert vLLMEngineProcessorConfig(**fields).model_source == made


@pytest.mark.parametrize("source", ["s3://bucket/folder", "/tmp", "org/name@v1"])
def test_a_revision_of_something_else_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"revision='v2' is not valid with model_source=.*: it names a version of a"):
        with_revision(source, "v2")
