"""One file of a sink, and what a second attempt at it leaves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydata_llm import ResumeConfig
from raydata_llm.ledger import Ledger
from raydata_llm.resume import ResumePlan, mark_failed
from raydata_llm.row_payload import ERROR_COLUMN, RESUME_COLUMN, RowRequest
from raydata_llm.sink_format import FileFormat
from raydata_llm.sink_storage import Storage
from raydata_llm.sink_task import WritePlan, rewrite_file, write_file

IDS = list(range(6))


def block(failed: list[int]) -> pa.Table:
    """What the processor's last operator gives for the rows when some fail."""
    rows = pa.table({"id": IDS, ERROR_COLUMN: ["bad" if number in failed else "" for number in IDS]})
    requests = [RowRequest(np.array([number], np.int32), None, b"") for number in IDS]
    plan = ResumePlan(config=ResumeConfig("out"), about={})
    admitted = plan.admit(rows, requests, [{"id": number} for number in IDS], [{}] * len(IDS))
    marks = mark_failed(admitted.column(RESUME_COLUMN), [number in failed for number in IDS])
    return rows.append_column(RESUME_COLUMN, marks)


def plan(folder: Path, *, resumable: bool) -> WritePlan:
    storage, letters = Storage.open(folder / "out"), Storage.open(folder / "letters")
    ledger = None
    if resumable:
        ledger, _ = Ledger.begin(storage, letters, "space", "aaaaaaaa", {}, retry_errors=True)
    file_format = FileFormat(name="parquet", compression="zstd")
    return WritePlan(storage=storage, letters=letters, format=file_format, token="aaaaaaaa", ledger=ledger)


def ids_in(folder: Path) -> list[int]:
    return sorted(number for file in folder.glob("*.parquet") for number in pq.read_table(file)["id"].to_pylist())


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
@pytest.mark.parametrize(
    "attempts",
    [([1, 2], [2, 3]), ([], [0]), ([0], []), (IDS, []), ([], IDS), ([4], [4])],
    ids=["others fail", "one fails", "one succeeds", "all succeed", "all fail", "the same"],
)
def test_an_attempt_takes_the_place_of_the_one_before(
    tmp_path: Path, attempts: tuple[list[int], list[int]], resumable: bool
) -> None:
    made = plan(tmp_path, resumable=resumable)
    for failed in attempts:
        files = write_file(made, 0, None, None, [block(failed)])
        assert Counter({file.is_error: file.rows for file in files}) == Counter(number in failed for number in IDS)
        assert ids_in(tmp_path / "letters") == failed
        assert ids_in(tmp_path / "out") == sorted(set(IDS) - set(failed))
    if resumable:
        storage, letters = made.storage, made.letters
        assert letters is not None
        _, entries = Ledger.begin(storage, letters, "space", "bbbbbbbb", {}, retry_errors=False)
        assert {entry.name for entry in entries} == {file.name for file in files}


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
def test_a_file_is_brought_to_another_schema_however_often(tmp_path: Path, resumable: bool) -> None:
    made = plan(tmp_path, resumable=resumable)
    [file] = write_file(made, 0, None, None, [block([])])
    schema = pa.schema([("id", pa.float64()), (ERROR_COLUMN, pa.string()), ("more", pa.list_(pa.int64()))])
    for _ in range(2):
        rewrite_file(made, file, schema)
        assert pq.read_schema(tmp_path / "out" / file.name) == schema
    assert ids_in(tmp_path / "out") == IDS


def test_blocks_without_rows_make_no_file(tmp_path: Path) -> None:
    assert write_file(plan(tmp_path, resumable=True), 0, None, None, [block([]).slice(0, 0)] * 2) == []
    assert ids_in(tmp_path / "out") == []
