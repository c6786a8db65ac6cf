"""Rows as the bytes of one file: Parquet or JSON lines, and one schema for all files of a folder.

Owns how blocks whose types drifted apart (an all-null column, an integer column with one float) are brought together.
Knows no store. Invariant: files encoded with one schema can be read together by a reader that looks at any of them
first.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydata_llm.ledger_entry import add_to_parquet

_TENSORS = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor")
# Rows turned into Python values at once.
_JSON_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How rows become a file.

    Args:
        name: "parquet" or "jsonl".
        compression: Of Parquet's pages, or "gzip" for whole files of JSON lines; None for neither.
    """

    name: str
    compression: str | None

    def __post_init__(self) -> None:
        known = {"parquet": ("zstd", "snappy", "gzip", "lz4", "brotli", None), "jsonl": ("gzip", None)}[self.name]
        if self.compression not in known:
            raise ValueError(
                f"compression={self.compression!r} is not valid for {self.name}: "
                f"choose one of {', '.join(map(repr, known))}"
            )

    @property
    def suffix(self) -> str:
        """What the files' names end with."""
        return {"parquet": ".parquet", "jsonl": ".jsonl.gz" if self.compression else ".jsonl"}[self.name]

    @property
    def has_schema(self) -> bool:
        """Whether a reader takes a folder's types from one of its files."""
        return self.name == "parquet"

    def encode(self, table: pa.Table, keys: bytes | None = None) -> pa.Buffer:
        """The bytes of a file.

        Args:
            table: Its rows.
            keys: Of its rows in a ledger, of which a Parquet file carries a copy where readers do not look.
        """
        if self.name == "parquet":
            stream = pa.BufferOutputStream()
            for index, field in enumerate(table.schema):
                if pa.types.is_struct(field.type) and not field.type.num_fields:  # {} in all rows: Parquet has no word
                    table = table.set_column(index, field.name, pa.nulls(table.num_rows))
            pq.write_table(table, stream, compression=self.compression or "none")
            return stream.getvalue() if keys is None else add_to_parquet(stream.getvalue(), keys)
        lines = "".join(_json_lines(table)).encode("utf-8", "surrogatepass")
        return pa.py_buffer(gzip.compress(lines, mtime=0) if self.compression else lines)


def merge_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema that holds the rows of all: nulls take the others' type, numbers the widest.

    Raises:
        ValueError: naming the column whose types have nothing in common.
    """
    merged = pa.schema([])
    for schema in schemas:
        plain = schema.remove_metadata()
        if merged.equals(plain):
            continue
        merged, plain = _without_ray_types(merged, plain)
        try:
            merged = pa.unify_schemas([merged, plain], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ValueError(_clash(merged, plain)) from None
    return merged


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the schema's columns and types; columns that it lacks are null.

    Raises:
        ValueError: for a value that the schema's type cannot hold.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        column = table.column(field.name)
        try:
            columns.append(column if column.type.equals(field.type) else _cast(column, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(
                f"column {field.name!r} is {column.type} in some rows and {field.type} in others, and does not "
                f"convert ({error}): let postprocess return one type"
            ) from None
    return pa.table(columns, schema=schema)


def concat_blocks(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows in one table, in order."""
    schema = merge_schemas(table.schema for table in tables)
    table = pa.concat_tables([conform(table, schema) for table in tables])
    for index, field in enumerate(table.schema):
        if _is_pickled(field.type):
            table = table.set_column(index, field.name, _unpickled(table.column(index)))
    return table


def _without_ray_types(one: pa.Schema, other: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
    """Both, with plain types for columns that Ray Data has in types of its own and differently in the two.

    It has arrays of several shapes in another type than those of one shape, and pickles them where a row has none, as
    error rows have. Lists hold all of these, and nulls, for any reader.
    """
    for field in other:
        index = one.get_field_index(field.name)
        if index < 0 or one.field(index).type.equals(field.type):
            continue
        kinds = [_plain_type(one.field(index).type), _plain_type(field.type)]
        typed = [kind for kind in kinds if not _is_pickled(kind) and not pa.types.is_null(kind)]
        if typed:
            # What was pickled is values of the other's type too, or cannot be written beside it anyway.
            kinds = [typed[0] if _is_pickled(kind) else kind for kind in kinds]
        one = one.set(index, one.field(index).with_type(kinds[0]))
        other = other.set(other.get_field_index(field.name), field.with_type(kinds[1]))
    return one, other


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if getattr(kind, "extension_name", "") not in _TENSORS:
        return kind
    plain = kind.value_type if hasattr(kind, "value_type") else kind.scalar_type
    for _ in kind.shape:
        plain = pa.list_(plain)
    return plain


def _is_pickled(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "ray.data.arrow_pickled_object"


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    if not isinstance(column.type, pa.BaseExtensionType):
        return column.cast(kind)
    return pa.chunked_array([pa.array(_plain_values(column), kind)])


def _unpickled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values in a type that any reader knows, if there is one."""
    try:
        return pa.chunked_array([pa.array(_plain_values(column))])
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return column


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    return [value.tolist() if hasattr(value, "tolist") else value for value in column.to_pylist()]


def _clash(one: pa.Schema, other: pa.Schema) -> str:
    for field in other:
        index = one.get_field_index(field.name)
        if index < 0:
            continue
        try:
            pa.unify_schemas([pa.schema([one.field(index)]), pa.schema([field])], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return (
                f"column {field.name!r} is {one.field(index).type} in some rows and {field.type} in others: "
                "let postprocess return one type, or the folder's files cannot be read together"
            )
    return f"the rows' schemas have nothing in common: {one} and {other}"


def _json_lines(table: pa.Table) -> Iterable[str]:
    for start in range(0, table.num_rows, _JSON_ROWS):
        for row in table.slice(start, _JSON_ROWS).to_pylist():
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_json_value)
            except ValueError:  # not a number: JSON has no word for it
                line = json.dumps(_without_nan(row), ensure_ascii=False, default=_json_value)
            yield f"{line}\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    return str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return value
