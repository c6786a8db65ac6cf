"""What the dispatcher knows of a row without opening it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm.row_payload import RowRequest
from raydata_llm.row_ticket import append_tickets, read_tickets, shared_prefixes


def request(params: Any = None, digest: bytes = bytes(16), error: str | None = None) -> RowRequest:
    return RowRequest(np.arange(3, dtype=np.int32), params, digest, error)


@pytest.mark.parametrize(
    ("params", "cost"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 7.0}, 7),
        ({}, 1 << 20),
        (None, 1 << 20),
        ({"max_tokens": "many"}, 1 << 20),
        ({"max_tokens": float("nan")}, 1 << 20),
        ({"max_tokens": float("inf")}, 1 << 20),
        ({"max_tokens": -3}, 1 << 20),
        ("no mapping", 1 << 20),
    ],
    ids=str,
)
def test_a_row_costs_what_it_may_write(params: Any, cost: int) -> None:
    tickets = append_tickets(pa.table({"x": [1]}), "t", [request(params)])
    assert read_tickets(tickets.column("t"))["cost"].tolist() == [cost]


def test_tickets_come_back_from_any_slice_of_a_table() -> None:
    digests = [bytes([number]) * 15 + b"\0" for number in range(5)]
    rows = [request({"max_tokens": number}, digest) for number, digest in enumerate(digests)]
    rows[3] = rows[3]._replace(error="KeyError: 'q' (preprocess)")
    table = append_tickets(pa.table({"x": range(5)}), "t", rows)
    tickets = read_tickets(pa.concat_tables([table, table]).slice(2, 5).column("t"))
    assert tickets["cost"].tolist() == [2, -1, 4, 0, 1]
    assert tickets["digest"][0].tobytes() == digests[2] and tickets["digest"][3].tobytes() == digests[0]


def test_rows_share_the_longest_prefix_that_another_row_of_the_block_has() -> None:
    system, first, second = (np.full(size, size, np.int32) for size in (200, 400, 401))
    rows = [
        np.concatenate([system, first, [1]]),
        np.concatenate([system, second, [2]]),
        np.concatenate([system, first, [3]]),
        np.concatenate([system, [4]]),
        np.arange(700, dtype=np.int32),
        np.arange(5, dtype=np.int32),
        None,
    ]
    marks = shared_prefixes(rows)
    assert marks[0] == marks[2] != 0, "one document"
    assert marks[1] == marks[3] not in (0, marks[0]), "only the instructions"
    assert marks[4:] == [0, 0, 0]
    assert shared_prefixes(rows[::-1]) == marks[::-1]
