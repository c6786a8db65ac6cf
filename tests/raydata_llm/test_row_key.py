"""What tells rows apart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm.row_key import row_digest

ROW = {"id": 7, "text": "héllo\ud800", "none": None, "nested": {"b": [1, 2.5], "a": b"x"}, "array": np.arange(3)}


@pytest.mark.parametrize(
    ("row", "beside"),
    [
        ({"id": 3}, {"id": 4.5}),
        ({"about": {"a": 1}}, {"about": {"a": 1, "b": "x"}}),
        ({"turns": [{"role": "user"}, {"role": "user", "name": "me"}]}, {"turns": [{"tools": [2.5]}]}),
        ({"x": [1, 2]}, {"x": [0.5], "y": "more"}),
    ],
    ids=["a whole number", "fields", "fields in a list", "a list of numbers"],
)
def test_a_rows_digest_is_the_same_beside_whichever_rows_it_lies(row: dict[str, Any], beside: dict[str, Any]) -> None:
    together = pa.concat_tables([pa.Table.from_pylist([one]) for one in (row, beside)], promote_options="permissive")
    [found, _] = together.to_pylist()
    assert found != row or str(found) != str(row), "Arrow changes it"
    assert row_digest(found) == row_digest(row) != row_digest(beside)


def test_equal_rows_have_equal_digests_whatever_the_order_of_their_columns() -> None:
    again = {"array": np.arange(3), "nested": {"a": b"x", "b": [1, 2.5]}, **ROW, "none": None}
    assert row_digest(again) == row_digest(ROW)


def test_a_digest_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from raydata_llm.row_key import row_digest;"
        "print(row_digest({'id': 7, 'text': 'héllo\\ud800', 'none': None, 'nested': {'b': [1, 2.5], 'a': b'x'},"
        "'array': np.arange(3), 'set': {'p', 'q', 'r'}}).hex())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == row_digest({**ROW, "set": {"r", "q", "p"}}).hex()


@pytest.mark.parametrize(
    "change",
    [
        {"id": 8},
        {"text": "hello"},
        {"nested": {"a": b"y", "b": [1, 2.5]}},
        {"array": np.arange(4)},
        {"array": np.arange(3.0)},
        {"new": False},
    ],
    ids=str,
)
def test_any_changed_value_changes_the_digest(change: dict[str, Any]) -> None:
    assert row_digest({**ROW, **change}) != row_digest(ROW)


def test_rows_that_json_cannot_say_have_digests_too() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for row in ({"x": {1: "a", "b": 2}}, {"x": object}, {"x": lambda: None}, {"x": loop}):
        assert len(row_digest(row)) == 16
