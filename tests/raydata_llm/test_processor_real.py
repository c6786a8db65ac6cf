"""The whole way with the real engine: prompts and model from S3, two replicas on two CPUs, answers back to S3."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import UserCodeException

from raydata_llm import RequestStateStats, build_llm_processor, vLLMEngineProcessorConfig
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.s3_stand import BUCKET, S3Stand, s3_stand
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

NUM_ROWS = 48
BAD = {
    5: ("missing column", "KeyError: 'question'; the row has "),
    11: ("wrong type", "messages=17 is a int"),
    23: ("too long", "max_model_len"),
    31: ("clown", "no clowns"),
}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Stand]:
    """An S3 server in this process, which Ray's workers know from their environment."""
    with s3_stand() as stand, ray_session(RAYDATA_LLM_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield stand


@pytest.fixture(scope="module")
def s3(stand: S3Stand) -> Any:
    return stand.client


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_model("qwen3"), folder, dirs_exist_ok=True)
    return save_tokenizer(folder)


def questions() -> pa.Table:
    return pa.table(
        {
            "id": pa.array(range(NUM_ROWS), pa.int32()),
            "kind": [BAD.get(number, ("good",))[0] for number in range(NUM_ROWS)],
            "tags": [["a", None] if number % 2 else None for number in range(NUM_ROWS)],
            "score": pa.array([None if number % 5 else number / 2 for number in range(NUM_ROWS)], pa.float32()),
        }
    )


def ask(row: dict[str, Any]) -> dict[str, Any]:
    words = "word " * (2000 if row["kind"] == "too long" else 3)
    role = "clown" if row["kind"] == "clown" else "user"
    messages: Any = [{"role": role, "content": f"{words}{row['id']}"}]
    if row["kind"] == "wrong type":
        messages = 17
    if row["kind"] == "missing column":
        messages = row["question"]
    # Rows that differ in their parameters, as only opaque ones arrive.
    params = {"temperature": 0.0, "max_tokens": 4} if row["id"] % 2 else {"top_k": 5, "max_tokens": 2, "seed": 1}
    return {"messages": messages, "sampling_params": params}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("id", "kind", "tags", "score", "finish_reason", "params", "metrics")}
    return {**kept, "tokens": row["generated_tokens"], "answer": row["generated_text"]}


def put_folder(client: Any, folder: Path, prefix: str) -> None:
    for file in folder.iterdir():
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.name}")


def put_table(client: Any, table: pa.Table, key: str) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    client.put_object(Bucket=BUCKET, Key=key, Body=sink.getvalue())


def get_tables(client: Any, prefix: str) -> list[pa.Table]:
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]]
    bodies = [client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys if key.endswith(".parquet")]
    return [pq.read_table(io.BytesIO(body)) for body in bodies]


def test_rows_go_from_s3_to_s3_through_two_replicas(stand: S3Stand, s3: Any, model_folder: Path) -> None:
    put_folder(s3, model_folder, "model")
    put_table(s3, questions(), "questions/part-0.parquet")
    config = vLLMEngineProcessorConfig(
        model_source=f"s3://{BUCKET}/model",
        engine_kwargs={"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "swap_space": 0},
        concurrency=2,
        batch_size=4,
        should_continue_on_error=True,
    )
    processor = build_llm_processor(config, preprocess=ask, postprocess=answer)
    processor(ray.data.read_parquet(f"s3://{BUCKET}/questions/")).write_parquet(f"s3://{BUCKET}/answers/")

    tables = get_tables(s3, "answers/")
    assert {str(table.schema.field("score").type) for table in tables} == {"float"}
    rows = sorted(pa.concat_tables(tables, promote_options="permissive").to_pylist(), key=lambda row: row["id"])
    carried = [{name: row[name] for name in questions().column_names} for row in rows]
    assert carried == questions().to_pylist(), "every row exactly once, its columns as they were"
    for row in rows:
        if row["id"] in BAD:
            assert BAD[row["id"]][1] in row["__inference_error__"] and row["tokens"] is None
        else:
            assert row["__inference_error__"] == "" and row["finish_reason"] in ("stop", "length")
            assert row["metrics"].keys() == vars(RequestStateStats()).keys()
            assert row["metrics"]["num_generation_tokens"] == len(row["tokens"])
            assert row["metrics"]["scheduled_ts"] < row["metrics"]["first_token_ts"]
            assert 1 <= len(row["tokens"]) <= (4 if row["id"] % 2 else 2)
            assert ('"top_k": 5' in row["params"]) == (row["id"] % 2 == 0)
    size = (model_folder / "model.safetensors").stat().st_size
    read = stand.bytes_read("model/model.safetensors")
    assert size <= read < 1.1 * size, "both replicas' weights, and the headers that the driver looked at"


def ask_for_form(row: dict[str, Any]) -> dict[str, Any]:
    number = row["id"]
    schema = {"type": "object", "properties": {f"k{number}": {"enum": [number, None]}}, "required": [f"k{number}"]}
    structured = {"json": schema | {"additionalProperties": False}, "disable_any_whitespace": True}
    if number == 3:
        structured = {"regex": "("}
    params = {"max_tokens": 60, "prompt_logprobs": 0, "structured_outputs": structured}
    if number == 5:
        params["prompt_logprob_token_ids"] = [4, 9]
    return {"prompt": f"hello {number}", "sampling_params": params}


def test_each_row_has_its_own_schema(s3: Any, model_folder: Path) -> None:
    config = vLLMEngineProcessorConfig(
        model_source=str(model_folder),
        engine_kwargs={"max_model_len": 128, "max_num_seqs": 8, "dtype": "float32"},
        should_continue_on_error=True,
    )
    rows = build_llm_processor(config, preprocess=ask_for_form)(ray.data.range(12)).take_all()
    assert len(rows) == 12
    for row in rows:
        if row["id"] == 3:
            assert "structured_outputs: regex cannot be compiled" in row["__inference_error__"]
            continue
        assert row["__inference_error__"] == ""
        assert row["finish_reason"] == "stop"
        assert json.loads(row["generated_text"]) in ({f"k{row['id']}": row["id"]}, {f"k{row['id']}": None})
        first, *others = row["prompt_logprobs"]
        assert first is None
        assert [one[0]["token_id"] for one in others] == list(row["prompt_token_ids"][1:])
        if row["id"] == 5:
            assert [len(one) for one in row["prompt_token_id_logprobs"]] == [2] * len(others)
        else:
            assert row.get("prompt_token_id_logprobs") is None


def test_kv_memory_that_is_too_small_is_one_clear_error(s3: Any, model_folder: Path) -> None:
    config = vLLMEngineProcessorConfig(
        model_source=str(model_folder), engine_kwargs={"kv_cache_memory_bytes": 1000, "max_model_len": 256}
    )
    processor = build_llm_processor(config, preprocess=ask)
    with pytest.raises(ValueError, match=r"max_model_len=256 .*kv_cache_memory_bytes=1000") as error:
        processor(ray.data.from_arrow(questions().slice(0, 4))).materialize()
    assert isinstance(error.value, UserCodeException)
