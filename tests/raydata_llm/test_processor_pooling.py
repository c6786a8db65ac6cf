"""Datasets through processors of pooling models, with the real engine: values in columns, a bad row as one error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from raydata_llm import LLM, build_llm_processor, vLLMEngineProcessorConfig
from raydata_llm.output_table import POOLED_COLUMNS
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer

TEXTS = [f"{word} fox jumps over {number} dogs " * (number % 3 + 1) for number, word in enumerate(["the", "a"] * 8)]


@pytest.fixture(scope="module", autouse=True)
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ray_session(RAYDATA_LLM_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model for each task."""
    heads = {"embed": 0, "classify": 3, "score": 1}
    folders = {}
    for task, num_labels in heads.items():
        folder = tmp_path_factory.mktemp(task)
        kind = "AutoModelForSequenceClassification" if num_labels else "AutoModel"
        save_pooling_model(folder, "bert", kind, **({"num_labels": num_labels} if num_labels else {}))
        folders[task] = str(save_pair_tokenizer(folder))
    return folders


def config_of(model: str, task_type: Any, **settings: Any) -> vLLMEngineProcessorConfig:
    return vLLMEngineProcessorConfig(model_source=model, task_type=task_type, preserve_order=True, **settings)


def table_of(dataset: Any) -> pa.Table:
    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))


def test_rows_are_embedded_and_a_bad_one_is_an_error(models: dict[str, str]) -> None:
    config = config_of(models["embed"], "embed", should_continue_on_error=True)
    rows: list[dict[str, Any]] = [{"id": index, "prompt": text} for index, text in enumerate(TEXTS)]
    rows[3]["prompt"] = "x " * 500
    rows[5]["prompt"] = None
    rows[7]["pooling_params"] = {"dimensions": 7}
    rows[9]["pooling_params"] = {"truncate_prompt_tokens": 6}
    rows[11] |= {"prompt": "x " * 500, "tokenization_kwargs": {"truncation": True}}
    rows[13]["pooling_params"] = {"task": "classify"}
    processor = build_llm_processor(config)
    # As items, so that Arrow fills in other rows' keys.
    table = table_of(processor(ray.data.from_items(rows)))
    assert [table.schema.field(name).type for name in POOLED_COLUMNS] == list(POOLED_COLUMNS.values())
    found = table.to_pylist()
    errors = {row["id"]: row["__inference_error__"] for row in found if row["__inference_error__"]}
    assert sorted(errors) == [3, 5, 7, 13]
    assert "max_model_len=90" in errors[3] and "(engine)" in errors[3]
    assert "prompt" in errors[5] and "is_matryoshka" in errors[7] and "task='classify'" in errors[13]
    assert (found[9]["num_input_tokens"], found[11]["num_input_tokens"]) == (6, 90)
    good = [row["id"] for row in found if not row["__inference_error__"] and row["id"] not in (9, 11)]
    wanted = LLM(models["embed"]).embed([TEXTS[index] for index in good])
    for index, output in zip(good, wanted, strict=True):
        assert output.outputs is not None and found[index]["prompt_token_ids"] == output.prompt_token_ids
        np.testing.assert_allclose(found[index]["embeddings"], output.outputs.embedding, atol=1e-5)


def test_rows_are_classified_as_the_docs_of_ray_have_it(models: dict[str, str]) -> None:
    config = config_of(models["classify"], "classify", engine_kwargs={"enforce_eager": True}, chat_template_stage=False)
    processor = build_llm_processor(
        config,
        preprocess=lambda row: {"prompt": row["text"], "pooling_params": {"use_activation": True}},
        postprocess=lambda row: {
            "probs": row["embeddings"].tolist() if hasattr(row["embeddings"], "tolist") else None,
            "text": row["text"],
            "same": bool(np.array_equal(row["embeddings"], row["probs"])),
        },
    )
    found = processor(ray.data.from_items([{"text": text} for text in TEXTS])).take_all()
    wanted = {text: output.outputs for text, output in zip(TEXTS, LLM(models["classify"]).classify(TEXTS), strict=True)}
    assert len(found) == len(TEXTS) and all(row["same"] for row in found)
    for row in found:
        output = wanted[row["text"]]
        assert output is not None
        np.testing.assert_allclose(row["probs"], output.probs, atol=1e-5)


def test_pairs_are_scored_and_a_broken_one_is_an_error(models: dict[str, str]) -> None:
    config = config_of(models["score"], "score", should_continue_on_error=True, concurrency=2)
    rows: list[dict[str, Any]] = [{"id": n, "data_1": "the fox", "data_2": text} for n, text in enumerate(TEXTS)]
    rows[4]["data_2"] = None
    found = build_llm_processor(config)(ray.data.from_items(rows)).take_all()
    wanted = LLM(models["score"]).score("the fox", TEXTS)
    assert "data_2=None" in found[4]["__inference_error__"] and found[4]["score"] is None
    for row, output in zip(found, wanted, strict=True):
        if row["id"] != 4:
            assert output.outputs is not None
            assert abs(row["score"] - output.outputs.score) < 1e-5 and abs(row["embeddings"][0] - row["score"]) < 1e-6


def test_the_driver_refuses_a_task_that_the_model_has_no_head_for(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task_type='classify' does not fit this BertModel"):
        build_llm_processor(config_of(models["embed"], "classify"))
    with pytest.raises(ValueError, match="task_type='score' does not fit"):
        build_llm_processor(config_of(models["classify"], "score"))
    with pytest.raises(
        ValueError, match=r"task_type='generate' does not fit the model .*gives no text: set task_type to 'embed'"
    ):
        build_llm_processor(config_of(models["embed"], "generate"))
    with pytest.raises(ValueError, match="max_model_len=91"):
        build_llm_processor(config_of(models["embed"], "embed", engine_kwargs={"max_model_len": 91}))
    save_pooling_model(tmp_path, "bert", num_hidden_layers=1)
    (tmp_path / "config.json").write_text((Path(models["embed"]) / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1"):
        build_llm_processor(config_of(str(tmp_path), "embed"))
