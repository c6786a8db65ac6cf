"""Datasets through a processor on a Ray of two CPUs, with an engine that needs no model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from raydata_llm import EngineProcessorConfig
from raydata_llm.processor import Processor
from raydata_llm.tokenizer import encode_chat, load_tokenizer
from tests.raydata_llm.patience import wait_until
from tests.raydata_llm.processor_fakes import (
    MAX_MODEL_LEN,
    ray_session,
    start_echo_engine,
    start_nothing,
    start_together,
)
from tests.raydata_llm.tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def read_folder(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.concat_tables(pq.read_table(file) for file in sorted(folder.iterdir())).to_pylist()
    return rows


def haiku(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "You are a bot that completes unfinished haikus."},
            {"role": "user", "content": row["item"]},
        ],
        "sampling_params": {"temperature": 0.3, "max_tokens": 250},
    }


def test_the_example_of_vllms_documentation_runs(model: str, tmp_path: Path) -> None:
    config = EngineProcessorConfig(model_source=model)
    processor = Processor(
        config,
        preprocess=haiku,
        postprocess=lambda row: {"answer": row["generated_text"]},
        engine_factory=start_echo_engine,
    )
    ds = processor(ray.data.from_items(["An old silent pond..."]))
    ds.write_parquet(f"local://{tmp_path}")
    [row] = read_folder(tmp_path)
    tokenizer = load_tokenizer(model)
    token_ids = encode_chat(tokenizer, haiku({"item": "An old silent pond..."})["messages"])[1]
    assert row == {"answer": tokenizer.decode(token_ids[::-1], skip_special_tokens=True)}


KINDS = {
    "missing column": "KeyError: 'no such column'; the row has ",
    "wrong type": "messages=3 is a int",
    "template": "no clowns",
    "too long": f"max_model_len={MAX_MODEL_LEN} allows fewer (engine)",
    "postprocess": "ZeroDivisionError: division by zero (postprocess)",
}


def ask(row: dict[str, Any]) -> dict[str, Any]:
    kind = row["kind"]
    content = "hi " * (MAX_MODEL_LEN if kind == "too long" else 1)
    role = "clown" if kind == "template" else "user"
    messages = {"wrong type": 3}.get(kind, [{"role": role, "content": content}])
    return {"messages": row["no such column"] if kind == "missing column" else messages}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    if row["kind"] == "postprocess":
        1 / 0  # noqa: B018
    return {**{name: row[name] for name in ("id", "kind", "nested", "small")}, "process": row["stop_reason"]}


def test_two_replicas_share_a_parquet_file_and_bad_rows_stand_alone(model: str, tmp_path: Path) -> None:
    source = pa.table(
        {
            "id": range(60),
            "kind": [dict(enumerate(KINDS)).get(row - 20, "good") for row in range(60)],
            "nested": [{"a": [row, None], "b": None} for row in range(60)],
            "small": pa.array([None if row % 3 else row for row in range(60)], pa.int8()),
        }
    )
    (tmp_path / "ready").mkdir()
    pq.write_table(source, tmp_path / "source.parquet")
    config = EngineProcessorConfig(model_source=model, concurrency=2, batch_size=4, should_continue_on_error=True)
    factory = start_together(tmp_path / "ready", size=2, seconds=0.2)
    processor = Processor(config, ask, answer, engine_factory=factory)
    processor(ray.data.read_parquet(str(tmp_path / "source.parquet"))).write_parquet(str(tmp_path / "answers"))

    tables = [pq.read_table(file) for file in (tmp_path / "answers").iterdir()]
    assert {str(table.schema.field("small").type) for table in tables} == {"int8"}
    rows = sorted(pa.concat_tables(tables, promote_options="permissive").to_pylist(), key=lambda row: row["id"])
    carried = [{name: row[name] for name in source.column_names} for row in rows]
    assert carried == source.to_pylist(), "every row exactly once, its columns as they were"
    for row in rows:
        assert KINDS.get(row["kind"], "") in row["__inference_error__"]
        assert bool(row["__inference_error__"]) == (row["kind"] in KINDS) == (row["process"] is None)
    assert len({row["process"] for row in rows} - {None}) == 2, "each replica had some"


def test_in_strict_mode_a_bad_row_stops_the_job_by_name(model: str) -> None:
    processor = Processor(EngineProcessorConfig(model_source=model), ask, answer, engine_factory=start_echo_engine)
    rows = [{"id": 7, "kind": "too long", "nested": None, "small": 1}]
    with pytest.raises(Exception, match="a row failed with ValueError: the prompt has") as error:
        processor(ray.data.from_items(rows)).materialize()
    assert KINDS["too long"] in str(error.value) and "{'id': 7, 'kind': 'too long'" in str(error.value)


def test_an_engine_that_cannot_start_stops_the_job_with_its_own_words(model: str) -> None:
    config = EngineProcessorConfig(model_source=model, should_continue_on_error=True)
    processor = Processor(config, lambda row: {"prompt": row["item"]}, engine_factory=start_nothing)
    with pytest.raises(Exception, match="ValueError: kv_cache_memory_bytes=1 is not valid: give 4096 or more") as error:
        processor(ray.data.from_items(["a", "b"])).materialize()
    assert str(error.value).count("kv_cache_memory_bytes=1 is not valid") <= 2


def test_counting_runs_no_row(model: str) -> None:
    processor = Processor(
        EngineProcessorConfig(model_source=model), lambda row: {"prompt": "x"}, engine_factory=start_nothing
    )
    ds = processor(ray.data.range(100))
    assert ds.count() == 100
    assert ds.limit(3).count() == 3


def test_an_empty_dataset_stays_empty(model: str) -> None:
    processor = Processor(EngineProcessorConfig(model_source=model), ask, answer, engine_factory=start_nothing)
    empty = pa.table({"id": pa.array([], pa.int64()), "kind": pa.array([], pa.string())})
    for ds in (ray.data.from_items([]), ray.data.from_arrow(empty), ray.data.range(5).filter(lambda row: False)):
        assert processor(ds).take_all() == []


def test_the_users_context_is_left_alone(model: str) -> None:
    def context() -> dict[str, str]:
        return {name: repr(value) for name, value in vars(ray.data.DataContext.get_current()).items()}

    before = context()
    processor = Processor(EngineProcessorConfig(model_source=model), engine_factory=start_nothing)
    processor(ray.data.range(5))
    processor(ray.data.range(6)).limit(2)
    assert context() == before


ODD_ROWS = {
    "interrupt": "KeyboardInterrupt: (preprocess)",
    "leave": "SystemExit: 3 (preprocess)",
    "deep": "'answer' is nested deeper than 63 levels",
    "half": "'answer' has half a character",
    "large": "'answer' has a whole number past 64 bits",
    "list": "'answer' is a list that no table holds beside the other rows' string",
}


def ask_oddly(row: dict[str, Any]) -> dict[str, Any]:
    if row["kind"] == "interrupt":
        raise KeyboardInterrupt
    if row["kind"] == "leave":
        raise SystemExit(3)
    return {"prompt": "hi"}


def answer_oddly(row: dict[str, Any]) -> dict[str, Any]:
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    odd: dict[str, Any] = {"deep": deep, "half": "a\ud800", "large": 2**64, "list": [1]}
    return {"kind": row["kind"], "answer": odd.get(row["kind"], row["generated_text"])}


def test_what_functions_raise_and_return_ends_no_job(model: str) -> None:
    config = EngineProcessorConfig(model_source=model, should_continue_on_error=True)
    processor = Processor(config, preprocess=ask_oddly, postprocess=answer_oddly, engine_factory=start_echo_engine)
    kinds = ["good", *ODD_ROWS, "good", "good"]
    rows = processor(ray.data.from_items([{"kind": kind} for kind in kinds], override_num_blocks=1)).take_all()
    assert sorted(row["kind"] for row in rows) == sorted(kinds)
    for row in rows:
        assert ODD_ROWS.get(row["kind"], "") in row["__inference_error__"]
        assert (row["answer"] is None) == (row["kind"] in ODD_ROWS) == (row["__inference_error__"] != "")


def test_a_task_tells_rays_interrupt_from_a_rows_own(tmp_path: Path) -> None:
    def work() -> None:
        from raydata_llm.ray_blocks import is_cancelled

        (tmp_path / "before").write_text(str(is_cancelled()))
        try:
            while True:  # Ray's interrupt does not end a sleep
                time.sleep(0.05)
        except KeyboardInterrupt:
            (tmp_path / "after").write_text(str(is_cancelled()))
            raise

    task = ray.remote(work).remote()
    assert wait_until(lambda: (tmp_path / "before").exists())
    ray.cancel(task)
    assert wait_until(lambda: (tmp_path / "after").exists())
    assert [(tmp_path / name).read_text() for name in ("before", "after")] == ["False", "True"]
