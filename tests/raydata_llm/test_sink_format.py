"""Rows as files, and one schema for all of them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydata_llm.ray_blocks import columns_to_arrow
from raydata_llm.sink_format import FileFormat, concat_blocks, conform, merge_schemas

PARQUET = FileFormat(name="parquet", compression="zstd")


def merged(*types: pa.DataType) -> pa.DataType:
    return merge_schemas(pa.schema([("x", kind)]) for kind in types).field("x").type


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([pa.null(), pa.string()], pa.string()),
        ([pa.int64(), pa.float64()], pa.float64()),
        ([pa.list_(pa.null()), pa.list_(pa.int64())], pa.list_(pa.int64())),
        (
            [pa.struct({"a": pa.null()}), pa.struct({"b": pa.int8(), "a": pa.string()})],
            pa.struct({"a": pa.string(), "b": pa.int8()}),
        ),
    ],
    ids=str,
)
def test_types_that_drifted_apart_have_one_that_holds_both(types: list[pa.DataType], expected: pa.DataType) -> None:
    assert merged(*types) == expected
    assert merged(*types, *types) == expected


def test_types_with_nothing_in_common_are_named() -> None:
    with pytest.raises(ValueError, match="column 'x' is int64 in some rows and string in others: let postprocess"):
        merged(pa.int64(), pa.string())
    with pytest.raises(ValueError, match="column 'x' is double in some rows and int64 in others, and does not convert"):
        conform(pa.table({"x": [0.5]}), pa.schema([("x", pa.int64())]))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([[np.ones(3)], [np.ones(3), None]], pa.list_(pa.float64())),
        ([[np.ones(3)], [np.ones(4)]], pa.list_(pa.float64())),
        ([[np.ones((2, 1))], [np.ones((2, 1)), np.ones((1, 2))], [None]], pa.list_(pa.list_(pa.float64()))),
        ([[np.ones(3, np.float32)], [[0.5]]], pa.list_(pa.float64())),
        ([[7, None], [datetime.date(2026, 1, 1), "x"], ["y"]], None),
    ],
    ids=["failed row", "two lengths", "two shapes", "array and list", "hopeless"],
)
def test_arrays_are_lists_where_ray_has_several_types_for_them(
    blocks: list[list[Any]], expected: pa.DataType | None, tmp_path: Path
) -> None:
    tables = [columns_to_arrow({"x": block}) for block in blocks]
    if expected is None:
        with pytest.raises(ValueError, match="let postprocess return one type"):
            concat_blocks(tables)
        return
    for order in (tables, tables[::-1]):
        table = concat_blocks(order)
        assert table.schema.field("x").type == expected
        (tmp_path / "x.parquet").write_bytes(PARQUET.encode(table))
        back = pq.read_table(tmp_path / "x.parquet").column("x").to_pylist()
        wanted = [value for each in order for value in each.column("x").to_pylist()]
        assert back == [value.tolist() if isinstance(value, np.ndarray) else value for value in wanted]


def test_a_file_of_arrays_fits_beside_one_in_which_a_row_failed(tmp_path: Path) -> None:
    tables = [columns_to_arrow({"x": [np.ones(2), *others]}) for others in ([], [None])]
    for number, table in enumerate(tables):
        (tmp_path / f"{number}.parquet").write_bytes(PARQUET.encode(concat_blocks([table])))
    written = [pq.read_table(tmp_path / f"{number}.parquet") for number in range(2)]
    assert written[1].schema.field("x").type == pa.list_(pa.float64())
    schema = merge_schemas(table.schema for table in written)
    mended = pa.concat_tables([conform(table, schema) for table in written])
    assert mended.column("x").to_pylist() == [[1, 1], [1, 1], None]


def test_structs_without_fields_are_written_and_fit_beside_others(tmp_path: Path) -> None:
    empty, other = pa.table({"id": [1], "x": [{}]}), pa.table({"id": [2], "x": [{"a": 5}]})
    (tmp_path / "x.parquet").write_bytes(PARQUET.encode(empty))
    written = pq.read_table(tmp_path / "x.parquet")
    assert written.to_pylist() == [{"id": 1, "x": None}]
    schema = merge_schemas([empty.schema, other.schema])
    assert conform(written, schema).schema == conform(other, schema).schema


def test_values_that_ray_pickled_stay_beside_nulls() -> None:
    tables = [columns_to_arrow({"x": [datetime.date(2026, 1, 1), "x"]}), columns_to_arrow({"x": [None]})]
    assert concat_blocks(tables).column("x").to_pylist() == [datetime.date(2026, 1, 1), "x", None]


def test_a_folder_of_conformed_files_is_read_whichever_comes_first(tmp_path: Path) -> None:
    tables = [
        pa.table({"id": [1], "x": pa.nulls(1)}),
        pa.table({"id": [2], "x": [[{"a": "b"}]], "y": [2.5]}),
        pa.table({"id": [3], "x": [[]]}),
    ]
    schema = merge_schemas(table.schema for table in tables)
    for number, table in enumerate(tables):
        (tmp_path / f"{number}.parquet").write_bytes(PARQUET.encode(conform(table, schema)))
    assert pq.read_table(tmp_path).to_pylist() == [
        {"id": 1, "x": None, "y": None},
        {"id": 2, "x": [{"a": "b"}], "y": 2.5},
        {"id": 3, "x": [], "y": None},
    ]
    assert concat_blocks(tables).num_rows == 3


def test_json_lines_say_what_json_can(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["héllo\n", None],
            "number": [float("nan"), 1.5],
            "bytes": [b"\xff", None],
            "when": [datetime.datetime(2026, 11, 23, 1, 2), None],
            "nested": [{"a": [1, None]}, None],
        }
    )
    content = FileFormat(name="jsonl", compression=None).encode(table)
    assert [json.loads(line) for line in bytes(content).decode().splitlines()] == [
        {
            "text": "héllo\n",
            "number": None,
            "bytes": "/w==",
            "when": "2026-11-23T01:02:00",
            "nested": {"a": [1, None]},
        },
        {"text": None, "number": 1.5, "bytes": None, "when": None, "nested": None},
    ]
    packed = FileFormat(name="jsonl", compression="gzip")
    assert packed.suffix == ".jsonl.gz" and packed.encode(table).size < content.size
    assert np.frombuffer(packed.encode(table), np.uint8)[:2].tolist() == [0x1F, 0x8B]


def test_a_wrong_compression_is_named() -> None:
    with pytest.raises(ValueError, match="compression='zip' is not valid for parquet: choose one of 'zstd', 'snappy'"):
        FileFormat(name="parquet", compression="zip")
