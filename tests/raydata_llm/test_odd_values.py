"""Whatever a user's function returns or raises costs its own row alone."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm import row_payload
from raydata_llm.odd_values import MOST_LEVELS, is_suspect, odd_values, why_unstorable
from raydata_llm.ray_blocks import columns_to_arrow
from raydata_llm.row_payload import RowError
from tests.raydata_llm.processor_chain import answered
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SOURCE = pa.table({"id": [1, 2, 3]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def lists(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def dicts(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def itself() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


class Leave(BaseException):
    """No error of Python's own."""


class Silent(Exception):
    """Has no message, and fails to say so."""

    def __str__(self) -> str:
        raise KeyError("no text")


RAISED: dict[str, tuple[BaseException, str]] = {
    "leaves": (SystemExit("bye"), "SystemExit: bye"),
    "interrupts": (KeyboardInterrupt("stop"), "KeyboardInterrupt: stop"),
    "closes": (GeneratorExit(), "GeneratorExit: ("),
    "own": (Leave("gone"), "Leave: gone"),
    "cancelled": (asyncio.CancelledError(), "CancelledError: ("),
    "silent": (Silent(), "Silent: its message cannot be made, for KeyError"),
    "half a character": (ValueError("a\ud800"), "ValueError: a\\ud800"),
    "deep": (RecursionError("too far"), "RecursionError: nested too deep (too far)"),
}


def assert_fails_alone(table: pa.Table, good: pa.Table, error: str) -> None:
    """The second of three rows has failed, in the schema of the others."""
    assert table.schema == good.schema and table.column("id").to_pylist() == [1, 2, 3]
    errors = table.column("__inference_error__").to_pylist()
    assert error in errors[1] and errors[::2] == ["", ""]


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
@pytest.mark.parametrize("case", RAISED)
def test_whatever_a_function_raises_is_its_rows_error(case: str, stage: str, model: str) -> None:
    raised, error = RAISED[case]

    def some(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 2:
            raise raised
        return {"prompt": "ab", "id": row["id"]}

    functions = (some, lambda row: {"id": row["id"]}) if stage == "preprocess" else (lambda row: {"prompt": "ab"}, some)
    good = answered(SOURCE.filter(pa.array([True, False, True])), model, *functions, keep_going=True)
    assert_fails_alone(answered(SOURCE, model, *functions, keep_going=True), good, error)
    with pytest.raises(RowError, match="'id': 2"):
        answered(SOURCE, model, *functions)


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
def test_a_task_that_ray_cancels_ends(stage: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydata_llm.ray_blocks.is_cancelled", lambda: True)
    row_payload.raise_if_cancelled(SystemExit())  # that comes from the row

    def interrupt(row: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    functions = (interrupt, None) if stage == "preprocess" else (lambda row: {"prompt": "ab"}, interrupt)
    with pytest.raises(KeyboardInterrupt):
        answered(SOURCE, model, *functions, keep_going=True)


# What a row makes where others make 7, and what is said of it.
VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "64 lists": (lambda: lists(64), "is nested deeper than 63 levels"),
    "300 dicts": (lambda: dicts(300), "is nested deeper than 63 levels"),
    "3000 lists": (lambda: lists(3000), ""),
    "itself": (itself, "is nested deeper than 63 levels"),
    "half a character": (lambda: "a\ud800", "has half a character"),
    "half a character within": (lambda: [{"x": ["\udfff"]}], "has half a character"),
    "half a character as a key": (lambda: {"\ud800": 1}, "has half a character"),
    "a number past 64 bits": (lambda: 2**64, "has a whole number past 64 bits"),
    "a number past 64 bits within": (lambda: {"x": [-(2**63) - 1]}, "has a whole number past 64 bits"),
    "text": (lambda: "seven", "is a str that no table holds beside the other rows' int64: return one type, or text"),
    "a list": (lambda: [7], "is a list that no table holds beside the other rows' int64"),
    "a dict": (lambda: {"x": 7}, "is a dict that no table holds beside the other rows' int64"),
    "an object": (lambda: 7j, "is a complex that no table holds beside the other rows' int64"),
    "an array": (lambda: np.ones((2, 2)), "is a ndarray that no table holds beside the other rows' int64"),
    "mixed within": (lambda: [7, "seven"], "is a list that no table holds beside the other rows' int64"),
}


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_no_column_holds_is_its_rows_error(case: str, stage: str, model: str) -> None:
    make, error = VALUES[case]

    def some(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "ab", "id": row["id"], "made": make() if row["id"] == 2 else 7}

    functions = (some, None) if stage == "preprocess" else (lambda row: {"prompt": "ab"}, some)
    good = answered(SOURCE.filter(pa.array([True, False, True])), model, *functions, keep_going=True)
    table = answered(SOURCE, model, *functions, keep_going=True)
    assert_fails_alone(table, good, error)
    assert table.column("made").to_pylist() == [7, None, 7]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:  # as Ray sends it
        writer.write_table(table)
    with pytest.raises(RowError, match="'id': 2"):
        answered(SOURCE, model, *functions)


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
@pytest.mark.parametrize("case", [case for case in VALUES if VALUES[case][1].startswith(("has", "is nested"))])
def test_a_block_of_such_values_is_a_block_of_error_rows(case: str, stage: str, model: str) -> None:
    def some(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "ab", "id": row["id"], "made": VALUES[case][0]()}

    functions = (some, None) if stage == "preprocess" else (lambda row: {"prompt": "ab"}, some)
    table = answered(SOURCE, model, *functions, keep_going=True)
    assert table.column("id").to_pylist() == [1, 2, 3]
    assert all(VALUES[case][1] in error for error in table.column("__inference_error__").to_pylist())


def test_a_columns_name_with_half_a_character_is_its_rows_error(model: str) -> None:
    def some(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], **({"a\ud800": 1} if row["id"] == 2 else {})}

    table = answered(SOURCE, model, lambda row: {"prompt": "ab"}, some, keep_going=True)
    assert table.column_names == ["id", "__inference_error__"]
    assert "the name of a column has half a character" in table.column("__inference_error__").to_pylist()[1]


def test_rows_that_failed_before_may_hold_anything(model: str) -> None:
    made = {1: lists(64), 2: "text", 3: 7}

    def some(row: dict[str, Any]) -> dict[str, Any]:
        return {"made": made[row["id"]], "sampling_params": {"temperature": -1}, "prompt": "ab"}

    table = answered(SOURCE, model, some, keep_going=True)
    assert all("temperature" in error for error in table.column("__inference_error__").to_pylist())
    assert not is_suspect(table.schema.field("made").type) and table.column("id").to_pylist() == [1, 2, 3]


def test_deep_parameters_are_their_rows_error(model: str) -> None:
    def some(row: dict[str, Any]) -> dict[str, Any]:
        deep = {"structured_outputs": {"json": dicts(3000)}}
        return {"prompt": "ab", "sampling_params": deep if row["id"] == 2 else {"max_tokens": 3}}

    table = answered(SOURCE, model, some, lambda row: {"id": row["id"]}, keep_going=True)
    errors = table.column("__inference_error__").to_pylist()
    assert "nested too deep" in errors[1] and errors[::2] == ["", ""]


def test_half_a_character_in_stop_strings_and_bad_words_is_their_rows_error(model: str) -> None:
    for name in ("stop", "bad_words"):

        def some(row: dict[str, Any], name: str = name) -> dict[str, Any]:
            return {"prompt": "ab", "sampling_params": {name: ["a\ud800"]} if row["id"] == 2 else None}

        table = answered(SOURCE, model, some, lambda row: {"id": row["id"]}, keep_going=True)
        errors = table.column("__inference_error__").to_pylist()
        assert f"ValueError: {name} has half a character" in errors[1] and errors[::2] == ["", ""]


def test_messages_of_several_forms_are_no_fault_of_a_row(model: str) -> None:
    contents: dict[int, Any] = {1: "hi", 2: [{"type": "text", "text": "hi"}], 3: "ho"}
    ask = lambda row: {"messages": [{"role": "user", "content": contents[row["id"]]}]}  # noqa: E731
    table = answered(SOURCE, model, ask, keep_going=True)
    assert table.column("__inference_error__").to_pylist() == [""] * 3


def test_columns_that_ray_pickled_pass_as_they_are(model: str) -> None:
    source = columns_to_arrow({"id": [1, 2], "any": [{"a": True}, {"a": "x"}]})
    assert is_suspect(source.schema.field("any").type)
    table = answered(source, model, lambda row: {"prompt": "ab"}, lambda row: dict(row), keep_going=True)
    assert table.column("any").to_pylist() == [{"a": True}, {"a": "x"}]
    assert table.column("__inference_error__").to_pylist() == [""] * 2


def test_the_type_of_most_rows_decides() -> None:
    day = datetime.date(2026, 1, 1)
    for values, odd in (
        ([1, "a", "b"], [0]),
        ([1, 2, "a"], [2]),
        ([{"a": 1}, {"b": [2]}, {"a": "x"}, {"c": 1.5}], [2]),
        ([1, 2.5, None, 3], []),
        ([7j, 8j, 1], []),  # a class that Arrow does not know, of most rows
        ([day, day, "x", 7j], [2, 3]),
    ):
        known = {index: value for index, value in enumerate(values) if value is not None}
        assert sorted(odd_values("x", known)) == odd, values


def test_what_a_table_holds_is_said_by_itself() -> None:
    for value in (lists(MOST_LEVELS), dicts(MOST_LEVELS), 2**64 - 1, -(2**63), "é\U0001f98a", {1: {2}}, b"\xff", None):
        assert why_unstorable(value) is None, value
    assert why_unstorable(lists(MOST_LEVELS + 1)) and why_unstorable(dicts(MOST_LEVELS + 1))
