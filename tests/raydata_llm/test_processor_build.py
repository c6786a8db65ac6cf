"""Building a processor: checked on the driver, without Ray, torch or a row."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import EngineProcessorConfig, ProcessorConfig, build_llm_processor, build_processor
from raydata_llm.processor import Processor


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


def test_building_imports_neither_ray_nor_torch(model: str) -> None:
    code = (
        "import sys; from raydata_llm import EngineProcessorConfig, build_llm_processor as build\n"
        f"build(EngineProcessorConfig(model_source={model!r}), preprocess=lambda row: row)\n"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_both_names_build_the_same(model: str) -> None:
    assert build_processor is build_llm_processor
    processor = build_processor(EngineProcessorConfig(model_source=model))
    assert isinstance(processor, Processor) and processor.config.model_source == model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_source": "/no/such/folder"}, "model_source='/no/such/folder'"),
        ({"engine_kwargs": {"max_model_len": 10**9}}, "max_model_len=1000000000"),
    ],
    ids=["missing folder", "too long"],
)
def test_a_model_that_cannot_work_is_refused(fields: dict[str, Any], message: str, model: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_llm_processor(EngineProcessorConfig(**{"model_source": model, **fields}))


async def ask_async(row: dict[str, Any]) -> dict[str, Any]:
    return row


def ask_many(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield row


class Ask:
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preprocess": 3}, "preprocess=3 is not valid: give a function of a row"),
        ({"preprocess": Ask}, "is not valid: give a function of a row"),
        ({"preprocess": ask_async}, "neither async nor a generator"),
        ({"postprocess": ask_many}, "neither async nor a generator"),
        (
            {"preprocess_map_kwargs": {"num_cpu": 1}},
            "preprocess_map_kwargs['num_cpu']=1 is not valid: did you mean num",
        ),
        ({"postprocess_map_kwargs": {"compute": 1}}, "postprocess_map_kwargs['compute']=1 is not valid"),
        ({"builder_kwargs": {"preprocess": ask_many}}, "builder_kwargs['preprocess'] is not valid"),
        ({"builder_kwargs": {"chat_template_kwargs": 3}}, "builder_kwargs['chat_template_kwargs']=3 is not valid"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str, model: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_llm_processor(EngineProcessorConfig(model_source=model), **arguments)


def test_only_an_engine_config_builds() -> None:
    with pytest.raises(ValueError, match=r"config=raydata_llm\.config\.ProcessorConfig is not valid: give an Engine"):
        build_llm_processor(ProcessorConfig())


def test_a_model_that_gives_no_text_is_named_with_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match=r"task_type='generate' does not fit the model in .*: set task_type to 'em"):
        build_llm_processor(EngineProcessorConfig(model_source=str(tmp_path), engine_kwargs={"load_format": "dummy"}))


def test_two_tokenizers_for_one_prompt_are_refused(model: str) -> None:
    config = EngineProcessorConfig(
        model_source=model, chat_template_stage={"model_source": "a"}, tokenize_stage={"model_source": "b"}
    )
    with pytest.raises(ValueError, match="two tokenizers, a and b: name one"):
        build_llm_processor(config)


def test_only_datasets_are_processed(model: str) -> None:
    with pytest.raises(ValueError, match=r"dataset=list is not valid: give a ray\.data\.Dataset"):
        build_llm_processor(EngineProcessorConfig(model_source=model))([{"prompt": "x"}])  # type: ignore[arg-type]


def test_stages_can_be_looked_at(model: str, caplog: pytest.LogCaptureFixture) -> None:
    processor = build_llm_processor(EngineProcessorConfig(model_source=model))
    assert "vLLMEngineStage" in processor.list_stage_names()
    assert processor.get_stage_by_name("replica").name == "replica"
    with pytest.raises(
        ValueError,
        match=r"name='engine' is not a stage that is on: choose one of .*, prepare",
    ):
        processor.get_stage_by_name("engine")
    with caplog.at_level(logging.INFO):
        processor.log_input_column_names()
    assert "messages" in caplog.text and "sampling_params" in caplog.text
