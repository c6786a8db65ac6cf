"""A row's request is its own: alone, and beside whatever rows Arrow puts into its block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydata_llm import SamplingParams, StructuredOutputsParams
from raydata_llm.arrow_values import ArrowRow
from raydata_llm.prepare import prepare
from raydata_llm.prepare_plan import PreparePlan
from raydata_llm.ray_blocks import columns_to_arrow
from raydata_llm.resume import ResumePlan
from raydata_llm.resume_config import ResumeConfig
from raydata_llm.row_key import row_digest
from raydata_llm.row_payload import RESUME_COLUMN
from tests.raydata_llm.processor_chain import prepared
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

# It writes all that a row can say to a template.
TEMPLATE = (
    "{{ messages | tojson }}|{{ tools | tojson }}|{{ mood | default('') | tojson }}|{{ facts | default('') | tojson }}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 3}}}},
}
OTHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "g",
        "description": "more",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "x": {"minimum": 0.5}},
            "required": ["city"],
        },
    },
}
CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 3}}}
OTHER_CALL: dict[str, Any] = {
    "id": "2",
    "type": "function",
    "function": {"name": "g", "arguments": {"city": "Bern", "x": 0.5}},
}
ROW: dict[str, Any] = {
    "messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "hi"}],
    "tools": [TOOL],
    "chat_template_kwargs": {"mood": {"glad": 2}, "facts": [{"title": "a"}]},
    "sampling_params": {"top_k": 5, "structured_outputs": {"json": TOOL["function"]["parameters"]}},
}
OTHER: dict[str, Any] = {
    "messages": [{"role": "assistant", "tool_calls": [OTHER_CALL]}, {"role": "user", "content": "ho", "name": "me"}],
    "tools": [OTHER_TOOL, OTHER_TOOL],
    "chat_template_kwargs": {"mood": {"sad": 1, "glad": 2.5}, "facts": [{"text": "b"}], "more": True},
    "sampling_params": {
        "top_k": 0.5,
        "max_tokens": 7,
        "structured_outputs": {"json": {**OTHER_TOOL["function"]["parameters"], "minProperties": 1}},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE))


def through_parquet(rows: list[dict[str, Any]], folder: Path) -> pa.Table:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return pq.read_table(folder / "rows.parquet")


def through_json_lines(rows: list[dict[str, Any]], folder: Path) -> pa.Table:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pyarrow.json.read_json(folder / "rows.jsonl")


def through_items(rows: list[dict[str, Any]], folder: Path) -> pa.Table:
    names = {name: 0 for row in rows for name in row}
    return columns_to_arrow({name: [row.get(name) for row in rows] for name in names})


WAYS = {"parquet": through_parquet, "json lines": through_json_lines, "items": through_items}


def first_request(table: pa.Table, model: str, **plan: Any) -> tuple[Any, ...]:
    """What the first row asks for: prompt, its tokens, parameters, and what it is known by."""
    [request, *_], [carried, *_] = prepared(table, model, keep_going=True, **plan)
    resume = ResumePlan(config=ResumeConfig("/nowhere"), about={})
    keyed = prepare(table, PreparePlan(model_source=model, keep_going=True, resume=resume, **plan))
    key = keyed.column(RESUME_COLUMN)[0].as_py()
    tokens = None if request.prompt_token_ids is None else request.prompt_token_ids.tolist()
    params = json.dumps(request.sampling_params)  # 5 is not 5.0
    return carried.prompt, tokens, params, request.error, request.digest, key


def hand_on(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ROW}


@pytest.mark.parametrize("hands_on", [None, hand_on], ids=["columns", "preprocess"])
@pytest.mark.parametrize("way", WAYS)
def test_a_request_is_what_the_row_has_alone(way: str, hands_on: Any, model: str, tmp_path: Path) -> None:
    table = WAYS[way]([ROW, OTHER], tmp_path)
    assert '"city": null' in json.dumps(table.to_pylist()[0]), "Arrow fills in"
    prompt, _, params, error, *known_by = first_request(table, model, preprocess=hands_on)
    assert error is None
    messages = [{**ROW["messages"][0], "content": ""}, ROW["messages"][1]]
    kwargs = ROW["chat_template_kwargs"]
    asked = (messages, ROW["tools"], kwargs["mood"], kwargs["facts"])
    assert [json.loads(part) for part in prompt.split("|")] == list(asked) and ".0" not in prompt
    assert json.loads(params) == ROW["sampling_params"] and ".0" not in params
    alone = first_request(WAYS[way]([ROW], tmp_path), model, preprocess=hands_on)
    assert alone == (prompt, _, params, error, *known_by)


NUMBERS = st.integers(-5, 5) | st.floats(-2, 2).map(lambda number: round(number, 1))
WORDS = st.text("abc", min_size=1, max_size=3)
FEW_WORDS = st.lists(WORDS, min_size=1, max_size=2)


def objects(wanted: dict[str, Any], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(wanted, optional=optional)


SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    objects(
        {"type": st.sampled_from(["string", "integer"])},
        minimum=NUMBERS,
        minLength=st.integers(0, 3),
        description=WORDS,
        enum=FEW_WORDS,
    ),
    lambda inner: objects(
        {"type": st.just("object"), "properties": st.dictionaries(WORDS, inner, min_size=1, max_size=2)},
        required=FEW_WORDS,
    ),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(WORDS, NUMBERS, min_size=1, max_size=2)
CALLS = objects({"function": objects({"name": WORDS, "arguments": ARGUMENTS})})
MESSAGES = objects(
    {"role": st.just("user"), "content": WORDS}, name=WORDS, tool_calls=st.lists(CALLS, min_size=1, max_size=2)
)
TOOLS = objects({"function": objects({"name": WORDS, "parameters": SCHEMAS})})
PARAMS = objects(
    {"temperature": st.floats(0.1, 1)},
    top_k=NUMBERS,
    max_tokens=st.integers(1, 9),
    structured_outputs=objects({"json": SCHEMAS}),
)
ROWS = objects(
    {"id": st.integers(0, 9), "messages": st.lists(MESSAGES, min_size=1, max_size=2)},
    tools=st.lists(TOOLS, min_size=1, max_size=2),
    chat_template_kwargs=st.dictionaries(st.sampled_from(["mood", "facts"]), SCHEMAS, min_size=1),
    sampling_params=PARAMS,
    note=st.none() | NUMBERS,
)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(row=ROWS, others=st.lists(ROWS, min_size=1, max_size=3))
def test_a_request_is_the_same_beside_any_rows(
    way: str, row: dict[str, Any], others: list[dict[str, Any]], model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    try:
        together = WAYS[way]([row, *others], folder)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return  # no file holds these side by side
    assert first_request(together, model) == first_request(WAYS[way]([row], folder), model)


def test_a_null_that_means_something_stays(model: str) -> None:
    schema = {"enum": ["a", None], "default": None, "minimum": 5.0}

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        assert row["schema"]["more"] is None, "preprocess sees what Ray shows"
        params = {"max_tokens": None, "structured_outputs": {"json": {"anyOf": [schema, row["schema"]]}}}
        return {"messages": [{"role": "user", "content": "x"}], "sampling_params": params, "tools": [schema]}

    table = pa.Table.from_pylist([{"schema": {"enum": ["a", None]}}, {"schema": {"more": 1}}])
    [request], [carried] = prepared(table.slice(0, 1), model, preprocess=ask)
    assert json.dumps(request.sampling_params) == json.dumps(
        {"max_tokens": None, "structured_outputs": {"json": {"anyOf": [schema, {"enum": ["a", None]}]}}}
    )
    assert carried.prompt is not None and carried.prompt.split("|")[1] == json.dumps([schema])


@pytest.mark.parametrize("ready", [True, False], ids=["ready parameters", "ready form"])
def test_a_rows_schema_within_ready_parameters_is_the_rows_own(ready: bool, model: str) -> None:
    def ask(row: dict[str, Any]) -> dict[str, Any]:
        form: Any = StructuredOutputsParams(json=row["schema"])
        params = SamplingParams(structured_outputs=form, max_tokens=3) if ready else {"structured_outputs": form}
        return {"prompt": "x", "sampling_params": params}

    own = {"properties": {"x": {"type": "integer"}}}
    table = pa.Table.from_pylist([{"schema": own}, {"schema": {"properties": {"y": {"const": 1}}}}])
    [request, _], _ = prepared(table, model, preprocess=ask)
    params = SamplingParams.from_mapping(request.sampling_params)
    assert params.structured_outputs is not None and params.structured_outputs.json_schema() == own


def test_token_ids_stay_whole_beside_a_row_that_has_none(model: str) -> None:
    table = pa.Table.from_pylist([{"tokenized_prompt": [5, 6]}, {"tokenized_prompt": [1.5]}])
    good, bad = prepared(table, model, keep_going=True)[0]
    assert good.prompt_token_ids is not None and good.prompt_token_ids.tolist() == [5, 6]
    assert bad.error is not None and "is not valid: give a list of token ids" in bad.error


def test_columns_may_be_json_text_which_arrow_leaves_as_it_is(model: str) -> None:
    exact: dict[str, Any] = {
        "tools": [{"default": None, "minimum": 5.0}],
        "chat_template_kwargs": {"mood": None},
        "sampling_params": {"max_tokens": None},
    }
    row = {"messages": json.dumps(ROW["messages"]), **{name: json.dumps(value) for name, value in exact.items()}}
    [request], [carried] = prepared(pa.Table.from_pylist([row]), model)
    assert carried.prompt is not None and request.sampling_params == {"max_tokens": None}
    assert carried.prompt.split("|")[1:3] == ['[{"default": null, "minimum": 5.0}]', "null"]
    listed = {**row, "tools": [json.dumps(tool) for tool in exact["tools"]]}
    assert prepared(pa.Table.from_pylist([listed]), model)[1][0].prompt == carried.prompt


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("sampling_params", "{", "ValueError: sampling_params='{' is text, but no JSON"),
        ("tools", ["[", "{}"], "ValueError: tools[0]='[' is text, but no JSON"),
        (
            "chat_template_kwargs",
            ["glad"],
            "TypeError: chat_template_kwargs=['glad'] is a list: give a dict of",
        ),
        ("chat_template_kwargs", "3", "TypeError: chat_template_kwargs=3 is a int"),
    ],
    ids=str,
)
def test_a_column_that_cannot_be_read_is_that_rows_error(column: str, value: Any, error: str, model: str) -> None:
    def ask(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": ROW["messages"], **({column: value} if row["id"] else {})}

    good, bad = prepared(pa.table({"id": [0, 1]}), model, preprocess=ask, keep_going=True)[0]
    assert good.error is None and bad.error is not None and error in bad.error


def test_a_rows_own_template_variables_come_before_the_jobs(model: str) -> None:
    rows = [{"prompt_number": 0}, {"prompt_number": 1}]
    own = [{"mood": "glad"}, None]
    _, carried = prepared(
        pa.Table.from_pylist(rows),
        model,
        preprocess=lambda row: {"messages": ROW["messages"], "chat_template_kwargs": own[row["prompt_number"]]},
        chat_template_kwargs={"mood": "sad", "facts": ["d"]},
    )
    assert [str(one.prompt).split("|")[2:] for one in carried] == [['"glad"', '["d"]'], ['"sad"', '["d"]']]


def test_what_a_user_makes_of_arrows_values_is_known_by_its_parts() -> None:
    row: dict[str, Any] = {"x": {"a": {"b": None, "c": 2.0}, "d": None}, "y": [1.0, None, {"e": None}]}
    arrow = ArrowRow(row)
    assert arrow.taken_out(row["x"]) == {"a": {"c": 2}} and arrow.taken_out(row["y"]) == [1, None, {}]
    mine = {**row["x"], "new": (row["y"][2], {"mine": None, "f": 2.0})}
    assert repr(arrow.taken_out(mine)) == repr({"a": {"c": 2}, "d": None, "new": ({}, {"mine": None, "f": 2.0})})


def test_a_digest_does_not_depend_on_how_a_list_begins() -> None:
    # Beside a row that no type holds, Ray Data pickles a column: then whole floats are not made of whole numbers.
    assert row_digest({"x": [1, 2.0]}) == row_digest({"x": [1.0, 2.0]})
    assert row_digest({"x": {"a": {"b": None}}}) == row_digest({"x": {"a": None}}) == row_digest({"x": None})


def test_flat_lists_are_arrows_as_others_are() -> None:
    row = {"a": [{"v": [1.0, None, 2.5], "ids": [1, 2], "deep": [[3.0], ["x"]]}]}
    taken = {"a": [{"v": [1, None, 2.5], "ids": [1, 2], "deep": [[3], ["x"]]}]}
    own = {"a": [{"v": [1.0, None, 2.5], "n": None}]}
    assert ArrowRow(None).taken_out(row) == ArrowRow({"row": row}).taken_out(row) == taken
    assert [type(one) for one in ArrowRow({"row": row}).taken_out(row)["a"][0]["v"]] == [int, type(None), float]
    kept = ArrowRow({"row": row}).taken_out(own)  # made by a function
    assert kept == own and type(kept["a"][0]["v"][0]) is float
