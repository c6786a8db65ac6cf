"""What travels beside the user's columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm.row_payload import (
    BLOCK_COLUMN,
    abbreviate,
    append_packed,
    check_column_names,
    describe_failure,
    open_block,
    pack,
    row_error,
    seal_block,
    unpack_column,
)


def test_python_values_come_back_exactly() -> None:
    values: list[Any] = [{"top_k": 5}, {"json": {"a": {"type": "integer"}}}, None, {1: (2, "x")}, np.float32(1.5)]
    table = append_packed(pa.table({"id": range(5)}), "packed", values)
    assert unpack_column(table, "packed") == values
    assert [type(value) for value in unpack_column(table, "packed")] == [type(value) for value in values]
    assert type(unpack_column(table, "packed")[0]["top_k"]) is int


def test_functions_of_the_drivers_script_travel_by_value() -> None:
    import pickle

    assert pickle.loads(pack(lambda x: x + 1))(2) == 3


def test_a_large_block_is_one_row_until_it_is_opened() -> None:
    table = pa.table({"id": range(1000), "text": ["x" * 50] * 1000, "list": [[1, None]] * 1000})
    sealed = seal_block(table, limit=table.nbytes)
    assert sealed.num_rows == 1 and sealed.column_names == [BLOCK_COLUMN]
    assert open_block(sealed).equals(table)


def test_a_small_block_is_left_alone() -> None:
    table = pa.table({"id": range(10)})
    assert seal_block(table, limit=table.nbytes + 1) is table
    assert seal_block(table, limit=None) is table
    assert open_block(table) is table


def test_columns_named_like_ours_are_refused() -> None:
    check_column_names(["prompt", "__data"])
    with pytest.raises(ValueError, match=r"'__raydata_llm_output' has a name .*: rename it"):
        check_column_names(["id", "__raydata_llm_output"])


def test_an_error_names_the_row_in_few_words() -> None:
    row = {"id": 3, "long": "y" * 10_000, "many": list(range(1000)), **{f"c{i}": "z" * 90 for i in range(9)}}
    text = abbreviate(row)
    assert text.startswith("{'id': 3, ") and "..." in text and len(text) <= 503
    message = str(row_error({"id": 3}, "KeyError: 'q' (preprocess)"))
    assert "KeyError: 'q' (preprocess)" in message and "{'id': 3}" in message
    assert "should_continue_on_error=True" in message


def test_a_missing_column_is_told_with_those_that_are_there() -> None:
    assert describe_failure(KeyError("question"), "preprocess", ["q", "id"]) == (
        "KeyError: 'question'; the row has q, id (preprocess)"
    )
    assert describe_failure(KeyError("q"), "preprocess", ["q", "id"]) == "KeyError: 'q' (preprocess)"
    assert describe_failure(KeyError(), "preprocess", ["q"]) == "KeyError: (preprocess)"
    many = describe_failure(KeyError("q"), "preprocess", [f"column_{number}" for number in range(1000)])
    assert many.endswith("... (preprocess)") and len(many) < 500
