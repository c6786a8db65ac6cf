"""The third operator: a finished row's columns, and error rows in the same schema."""

from __future__ import annotations

import datetime
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm.output_table import ASKED_COLUMNS, OUTPUT_COLUMNS
from raydata_llm.ray_blocks import block_rows, columns_to_arrow
from raydata_llm.row_payload import RowError
from raydata_llm.tokenizer import encode_text, load_tokenizer
from tests.raydata_llm.processor_chain import answered, params_of
from tests.raydata_llm.processor_fakes import MAX_MODEL_LEN
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

COLUMNS = {
    "id": pa.array([1, None, 3], pa.int32()),
    "text": pa.array(["a", None, "c"], pa.large_string()),
    "when": pa.array([datetime.datetime(2026, 1, 1), None, datetime.datetime(2026, 1, 3)], pa.timestamp("ns")),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int16())),
    "nested": pa.array([{"a": {"b": [1.5]}}, {"a": None}, None]),
    "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    "raw": pa.array([b"\x00\xff", None, b""]),
    "nothing": pa.nulls(3),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "hello", "sampling_params": {"max_tokens": 3}}


def assert_carried(table: pa.Table) -> None:
    for name, column in COLUMNS.items():
        assert table.column(name).type == column.type, name
        assert table.column(name).to_pylist() == column.to_pylist(), name


def test_a_row_has_the_engines_columns(model: str) -> None:
    seen: list[dict[str, Any]] = []

    def look(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(row)
        return {"answer": row["generated_text"]}

    table = answered(pa.table({"id": [4]}), model, ask, look)
    [row] = seen
    tokenizer = load_tokenizer(model)
    prompt = encode_text(tokenizer, "hello")
    assert table.to_pylist() == [{"answer": row["generated_text"]}]
    assert set(row) == {"id"} | set(OUTPUT_COLUMNS) - ASKED_COLUMNS
    assert row["id"] == 4 and row["prompt"] == "hello"
    assert row["prompt_token_ids"] == prompt and row["num_input_tokens"] == len(prompt)
    assert row["generated_tokens"] == prompt[::-1][:3] and row["num_generated_tokens"] == len(prompt[::-1][:3])
    assert row["generated_text"] == tokenizer.decode(row["generated_tokens"], skip_special_tokens=True)
    assert (row["finish_reason"], row["cumulative_logprob"]) == ("length", -1.5) and "process" in row["stop_reason"]
    assert row["logprobs"] is row["prompt_logprobs"] is row["embeddings"] is row["metrics"] is None
    assert len(row["batch_uuid"]) == 32
    assert row["time_taken_llm"] > 0 and row["request_id"] == 0 and row["__inference_error__"] == ""
    assert params_of(row) == {"max_tokens": 3, "temperature": 0.25}


def test_without_postprocess_all_columns_come_out_and_the_datasets_own_are_untouched(model: str) -> None:
    table = answered(pa.table(COLUMNS), model, lambda row: {**ask(row), "extra": [{"row": row["id"]}]})
    assert table.column_names[: len(COLUMNS)] == list(COLUMNS)
    assert_carried(table)
    assert set(table.column_names) == set(COLUMNS) | {"extra"} | set(OUTPUT_COLUMNS) - ASKED_COLUMNS
    for name, kind in OUTPUT_COLUMNS.items():
        assert name in ASKED_COLUMNS or table.column(name).type == kind, name
    assert table.column("extra").to_pylist() == [[{"row": 1}], [{"row": None}], [{"row": 3}]]


def test_columns_that_postprocess_hands_on_are_untouched(model: str) -> None:
    assert_carried(answered(pa.table(COLUMNS), model, ask, lambda row: {**row, "new": 1}))


def test_tensor_columns_are_carried(model: str) -> None:
    tensors = np.arange(24.0).reshape(3, 2, 4)
    source = columns_to_arrow({"id": [0, 1, 2], "image": list(tensors)})
    for postprocess in (None, lambda row: dict(row)):
        table = answered(source, model, ask, postprocess)
        assert table.column("image").type == source.column("image").type
        for row in block_rows(table):
            assert np.array_equal(row["image"], tensors[row["id"]])


def test_what_postprocess_changes_in_place_is_changed(model: str) -> None:
    def grow(row: dict[str, Any]) -> dict[str, Any]:
        row["list"] = row["list"] or []
        row["list"].append(9)
        row["nested"] = row["nested"] or {}
        row["nested"]["c"] = "new"
        return {"list": row["list"], "nested": row["nested"], "id": (row["id"] or 0) + 1}

    table = answered(pa.table(COLUMNS), model, ask, grow)
    assert table.column("list").to_pylist() == [[1, None, 9], [9], [9]]
    assert [value["c"] for value in table.column("nested").to_pylist()] == ["new"] * 3
    assert table.column("id").type == pa.int32(), "the dataset's own type, as in blocks where nothing changed"
    assert table.column("id").to_pylist() == [2, 1, 4]


def test_a_changed_column_may_have_another_type(model: str) -> None:
    table = answered(pa.table({"id": [1, 2]}), model, ask, lambda row: {"id": f"row {row['id']}"})
    assert table.column("id").to_pylist() == ["row 1", "row 2"]


def test_values_of_preprocess_reach_postprocess_exactly(model: str) -> None:
    made = [{"schema": {"x": {"type": "int"}}, "k": 5}, {"schema": {"y": [1, "two", None]}, "k": None}, {"only": (1,)}]
    seen: list[Any] = []

    def look(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(row["made"])
        return {"id": row["id"]}

    answered(pa.table({"id": [0, 1, 2]}), model, lambda row: {**ask(row), "made": made[row["id"]]}, look)
    assert seen == made and [type(value["k"]) for value in seen[:2]] == [int, type(None)]


def test_mixed_parameters_reach_the_engine_exactly(model: str) -> None:
    given: list[dict[str, Any]] = [
        {"temperature": 0.0, "max_tokens": 8},
        {"top_k": 5, "stop": ["x"], "logit_bias": {7: 1.5}},
        {"max_tokens": None, "seed": 3},
        {},
    ]
    preprocess = lambda row: {"prompt": "x", "sampling_params": given[row["id"]]}  # noqa: E731
    table = answered(pa.table({"id": range(4)}), model, preprocess)
    assert [params_of(row) for row in table.to_pylist()] == [
        {"temperature": 0.0, "max_tokens": 8},
        {"temperature": 0.25, "top_k": 5, "stop": ["x"], "logit_bias": {"7": 1.5}},
        {"temperature": 0.25, "max_tokens": None, "seed": 3},
        {"temperature": 0.25},
    ]


def test_several_outputs_are_kept_beside_the_first(model: str) -> None:
    params = [{"n": 3, "max_tokens": 2, "logprobs": 1}, {"max_tokens": 2}]
    preprocess = lambda row: {"prompt": "hello", "sampling_params": params[row["id"]]}  # noqa: E731
    table = answered(pa.table({"id": [0, 1]}), model, preprocess)
    first, second = table.to_pylist()
    assert table.column("outputs").type == OUTPUT_COLUMNS["outputs"]
    assert [choice["index"] for choice in first["outputs"]] == [0, 1, 2] and second["outputs"] is None
    assert first["outputs"][0]["text"] == first["generated_text"]
    assert first["outputs"][0]["token_ids"] == first["generated_tokens"]


def test_logprobs_are_keyed_by_token_for_postprocess_and_lists_in_tables(model: str) -> None:
    seen: list[Any] = []

    def look(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(row["logprobs"])
        return row

    ask_logprobs = lambda row: {"prompt": "hello", "sampling_params": {"max_tokens": 1, "logprobs": 1}}  # noqa: E731
    table = answered(pa.table({"id": [0]}), model, ask_logprobs, look)
    token_id = table.column("generated_tokens").to_pylist()[0][0]
    entry = seen[0][0][token_id]
    assert (entry["logprob"], entry["rank"]) == (-0.5, 1)
    assert entry["decoded_token"] == load_tokenizer(model).decode([token_id])
    [[[likeliest, other]]] = table.column("logprobs").to_pylist()
    assert likeliest == {"token_id": token_id, **entry} and other["token_id"] == 7


def test_prompt_logprobs_begin_with_none(model: str) -> None:
    asking = lambda row: {"prompt": "hello you", "sampling_params": {"prompt_logprobs": 0}}  # noqa: E731
    table = answered(pa.table({"id": [0]}), model, asking)
    [prompt_token_ids] = table.column("prompt_token_ids").to_pylist()
    [[first, *others]] = table.column("prompt_logprobs").to_pylist()
    assert first is None
    assert [[entry["token_id"] for entry in position] for position in others] == [[one] for one in prompt_token_ids[1:]]
    assert others[0][0]["decoded_token"] == load_tokenizer(model).decode(prompt_token_ids[1:2])


def test_detokenising_can_be_left_out_altogether(model: str) -> None:
    off = lambda row: {"prompt": "hello", "sampling_params": {"detokenize": False}}  # noqa: E731
    texts = [
        answered(pa.table({"id": [0]}), model, off, detokenize=True).column("generated_text")[0].as_py(),
        answered(pa.table({"id": [0]}), model, off, detokenize=False).column("generated_text")[0].as_py(),
        answered(pa.table({"id": [0]}), model, ask, detokenize=False).column("generated_text")[0].as_py(),
    ]
    assert [bool(text) for text in texts] == [True, False, True]


def fail_some(row: dict[str, Any]) -> dict[str, Any]:
    """Preprocess of rows that fail in one stage each."""
    if row["fails"] == "preprocess":
        return {"prompt": row["no such column"]}
    prompt = "x" * (MAX_MODEL_LEN + 1) if row["fails"] == "engine" else "hello"
    return {"prompt": prompt, "sampling_params": {"top_j": 1} if row["fails"] == "sampling_params" else {}}


def post_some(row: dict[str, Any]) -> dict[str, Any]:
    if row["fails"] == "postprocess":
        raise RuntimeError("no answer")
    return {"id": row["id"], "answer": row["generated_text"], "length": row["num_generated_tokens"]}


STAGES = {
    "preprocess": "KeyError: 'no such column'; the row has id, fails (preprocess)",
    "sampling_params": "ValueError: sampling_params has unknown field(s) top_j: did you mean top_",
    "engine": f"max_model_len={MAX_MODEL_LEN} allows fewer (engine)",
    "postprocess": "RuntimeError: no answer (postprocess)",
}


def test_rows_that_fail_are_rows_of_the_same_schema(model: str) -> None:
    source = pa.table({"id": pa.array(range(5), pa.int16()), "fails": [*STAGES, "nowhere"]})
    table = answered(source, model, fail_some, post_some, keep_going=True)
    good = answered(source.slice(4), model, fail_some, post_some, keep_going=True)
    assert table.schema == good.schema
    assert table.column_names == ["id", "answer", "length", "__inference_error__"]
    assert table.column("id").to_pylist() == list(range(5))
    for row, message in zip(table.to_pylist(), STAGES.values(), strict=False):
        assert message in row["__inference_error__"] and row["answer"] is None and row["length"] is None
    assert table.to_pylist()[4]["__inference_error__"] == "" and table.to_pylist()[4]["answer"]


class RefusedError(Exception):
    """Can be packed, but not unpacked, as many exceptions of two arguments."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)


def test_a_row_whose_made_values_cannot_be_unpacked_fails_alone(model: str) -> None:
    def remember(row: dict[str, Any]) -> dict[str, Any]:
        return ask(row) | {"cause": RefusedError(404, "not there") if row["id"] == 1 else None}

    table = answered(pa.table({"id": [0, 1, 2]}), model, remember, post_id, keep_going=True)
    first, second, third = table.to_pylist()
    assert (first["answer"], third["answer"]) == (0, 2) and second["answer"] is None and second["id"] == 1
    assert "what preprocess returned cannot be read again" in second["__inference_error__"]
    with pytest.raises(RowError, match=r"cannot be read again.*\(preprocess\). Its input columns: {'id': 1}"):
        answered(pa.table({"id": [0, 1, 2]}), model, remember, post_id)


def post_id(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "answer": row["id"]}


def test_rows_that_fail_have_all_columns_where_all_are_kept(model: str) -> None:
    source = pa.table({"id": [1, 2], "fails": ["engine", "nowhere"]})
    table = answered(source, model, fail_some, keep_going=True)
    assert table.schema == answered(source.slice(1), model, fail_some, keep_going=True).schema
    assert table.schema == answered(source.slice(0, 1), model, fail_some, keep_going=True).schema
    assert table.column("generated_text").to_pylist()[0] is None


def test_a_block_of_bad_rows_has_its_input_columns_and_the_error(model: str) -> None:
    source = pa.table({"id": [1, 2], "fails": ["engine", "preprocess"]})
    table = answered(source, model, fail_some, post_some, keep_going=True)
    assert table.column_names == ["id", "fails", "__inference_error__"]
    assert table.drop_columns(["__inference_error__"]).equals(source)


def test_a_failed_row_is_null_where_good_rows_have_another_type_than_its_input(model: str) -> None:
    source = pa.table({"answer": [7, 8], "fails": ["engine", "nowhere"]})
    make = lambda row: {"answer": row["generated_text"], "fails": row["fails"]}  # noqa: E731
    table = answered(source, model, fail_some, make, keep_going=True)
    assert pa.types.is_string(table.schema.field("answer").type)
    assert table.column("answer").to_pylist()[0] is None and table.column("fails").to_pylist()[0] == "engine"


def test_a_category_that_postprocess_changes_stays_a_category(model: str) -> None:
    source = pa.table({"kind": pa.array(["b ", "a"]).cast(pa.dictionary(pa.int8(), pa.string()))})
    table = answered(source, model, ask, lambda row: {"kind": row["kind"].strip()}, keep_going=True)
    assert table.schema.field("kind") == source.schema.field("kind") and table.column("kind").to_pylist() == ["b", "a"]


def test_a_column_has_one_type_whether_or_not_rows_of_its_block_failed(model: str) -> None:
    source = pa.table({"id": [1, 2, 3], "fails": ["engine", "nowhere", "nowhere"]})
    moment = datetime.datetime(2026, 11, 28, 12, 30)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        return {"at": moment, "maybe": None if row["id"] == 3 else moment, "request_id": "seven"}

    table = answered(source, model, fail_some, make, keep_going=True)
    assert table.schema == answered(source.slice(1, 1), model, fail_some, make, keep_going=True).schema
    assert table.column("at").to_pylist() == [None, moment, moment]
    assert table.column("maybe").to_pylist() == [None, moment, None]


WANTED = pa.schema([("length", pa.int16()), ("answer", pa.large_string()), ("id", pa.int32()), ("more", pa.float32())])


def test_an_output_schema_types_good_rows_bad_rows_and_blocks_of_bad_rows(model: str) -> None:
    source = pa.table({"id": pa.array(range(5), pa.int16()), "fails": [*STAGES, "nowhere"]})
    tables = [
        answered(part, model, fail_some, post_some, keep_going=True, output_schema=WANTED)
        for part in (source, source.slice(0, 2), source.slice(4))
    ]
    for table in tables:
        assert table.schema == WANTED.append(pa.field("__inference_error__", pa.string()))
    assert [row["id"] for row in tables[1].to_pylist()] == [0, 1], "known columns stay"
    [good] = tables[2].to_pylist()
    assert good["answer"] and good["more"] is None and good["__inference_error__"] == ""
    strict = answered(source.slice(4), model, fail_some, post_some, output_schema=WANTED)
    assert strict.schema == WANTED


def test_a_row_that_does_not_fit_the_output_schema_fails_alone(model: str) -> None:
    source = pa.table({"id": [1, 2, 3], "fails": ["nowhere"] * 3})

    def make(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": {1: 1, 2: "two", 3: 3}[row["id"]], **({"extra": 1} if row["id"] == 3 else {})}

    table = answered(source, model, fail_some, make, keep_going=True, output_schema=pa.schema([("id", pa.int64())]))
    errors = table.column("__inference_error__").to_pylist()
    assert errors[0] == "" and "id='two' does not fit output_schema's int64" in errors[1]
    assert "the column 'extra' is not in output_schema, which has id" in errors[2]
    assert table.column("id").to_pylist() == [1, 2, 3], "a failed row has its own values where they fit"


@pytest.mark.parametrize("stage", STAGES)
def test_without_leave_to_go_on_a_bad_row_stops_the_block_by_name(stage: str, model: str) -> None:
    source = pa.table({"id": [70, 71], "fails": ["nowhere", stage]})
    with pytest.raises(RowError) as error:
        answered(source, model, fail_some, post_some)
    assert STAGES[stage] in str(error.value) and "'id': 71" in str(error.value)


def test_without_leave_to_go_on_good_rows_have_no_error_column(model: str) -> None:
    source = pa.table({"id": [1], "fails": ["nowhere"]})
    assert answered(source, model, fail_some, post_some).column_names == ["id", "answer", "length"]


@pytest.mark.parametrize("made", [None, [], {}, "text"], ids=str)
def test_postprocess_must_return_columns(made: Any, model: str) -> None:
    with pytest.raises(RowError, match="return a dict of columns"):
        answered(pa.table({"id": [1]}), model, ask, lambda row: made)


def leave(row: dict[str, Any]) -> dict[str, Any]:
    sys.exit("no such file")


NEITHER_ROW_NOR_ERROR: dict[str, tuple[Callable[..., Any], str]] = {
    "leaves": (leave, "SystemExit: no such file"),
    "number": (lambda row: {"prompt": "ab", 7: 1}, "TypeError: the column 7 is named by a int: give names as text"),
    "ours": (
        lambda row: {"prompt": "ab", "__raydata_llm_resume": 1},
        "ValueError: the column '__raydata_llm_resume' has a name that raydata_llm needs itself",
    ),
}


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
@pytest.mark.parametrize("case", NEITHER_ROW_NOR_ERROR)
def test_what_is_neither_a_row_nor_an_error_fails_alone(case: str, stage: str, model: str) -> None:
    function, error = NEITHER_ROW_NOR_ERROR[case]

    def some(row: dict[str, Any]) -> Any:
        return function(row) if row["id"] == 2 else {"prompt": "ab", "id": row["id"]}

    functions = (some, lambda row: {"id": row["id"]}) if stage == "preprocess" else (ask, some)
    table = answered(pa.table({"id": [1, 2, 3]}), model, *functions, keep_going=True)
    assert table.column("id").to_pylist() == [1, 2, 3]
    errors = table.column("__inference_error__").to_pylist()
    assert error in errors[1] and errors[1].endswith(f"({stage})") and errors[::2] == ["", ""]
    with pytest.raises(RowError, match="'id': 2"):
        answered(pa.table({"id": [1, 2, 3]}), model, *functions)


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
def test_a_value_that_cannot_be_sent_on_or_written_fails_its_row_alone(stage: str, model: str) -> None:
    def make(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "ab", "id": row["id"], "made": threading.Lock() if row["id"] == 2 else 7}

    functions = (make, None) if stage == "preprocess" else (ask, make)
    source = pa.table({"id": [1, 2, 3]})
    table = answered(source, model, *functions, keep_going=True)
    errors = table.column("__inference_error__").to_pylist()
    said = {
        "preprocess": "cannot be sent on: cannot pickle",
        "postprocess": "'made' is a lock, which no table can hold",
    }
    assert said[stage] in errors[1] and errors[::2] == ["", ""]
    assert table.column("made").to_pylist() == [7, None, 7] and table.column("id").to_pylist() == [1, 2, 3]
    only = answered(source.slice(1, 1), model, *functions, keep_going=True)
    assert only.column("id").to_pylist() == [2] and only.column("__inference_error__").to_pylist() == errors[1:2]
    with pytest.raises(RowError, match="'id': 2"):
        answered(source, model, *functions)


def test_half_a_character_fails_its_row_alone(model: str) -> None:
    source = pa.table({"id": [1, 2, 3]})
    table = answered(source, model, lambda row: {"prompt": "\ud800" if row["id"] == 2 else "ab"}, keep_going=True)
    errors = table.column("__inference_error__").to_pylist()
    assert errors[1].endswith("(tokenize)") and errors[::2] == ["", ""]
    assert table.column("prompt").to_pylist() == ["ab", None, "ab"]
    only = answered(source.slice(1, 1), model, lambda row: {"prompt": "\ud800"}, keep_going=True)
    assert only.schema == table.schema and only.column("__inference_error__").to_pylist() == errors[1:2]
