"""The table of a finished block.

Owns the Arrow types of the engine's columns and the schema of error rows. A column of the dataset that comes through
unchanged is the dataset's own Arrow column again, type and nulls included. Knows no tokens and no model.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from raydata_llm.odd_values import UnstorableError, is_suspect, odd_values, why_too_deep, why_unstorable
from raydata_llm.ray_blocks import columns_to_arrow
from raydata_llm.row_payload import ERROR_COLUMN, describe_failure

Row = dict[str, Any]

_LOGPROBS = pa.list_(
    pa.list_(
        pa.struct({"token_id": pa.int32(), "logprob": pa.float64(), "rank": pa.int32(), "decoded_token": pa.string()})
    )
)
# vLLM's `RequestStateStats`.
_METRICS = pa.struct(
    {
        "num_generation_tokens": pa.int64(),
        "arrival_time": pa.float64(),
        "queued_ts": pa.float64(),
        "scheduled_ts": pa.float64(),
        "first_token_ts": pa.float64(),
        "last_token_ts": pa.float64(),
        "first_token_latency": pa.float64(),
        "is_corrupted": pa.bool_(),
    }
)
_KEYED = ("stop_reason", "logprobs")
_CHOICE = pa.struct(
    {
        "index": pa.int64(),
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "num_tokens": pa.int64(),
        "finish_reason": pa.string(),
        "stop_reason": pa.string(),
        "cumulative_logprob": pa.float64(),
        "logprobs": _LOGPROBS,
    }
)
# What the engine adds to a row, and its Arrow type where it reaches the output. Fixed, so that a block in which all
# values are null has the schema of the others.
OUTPUT_COLUMNS: dict[str, pa.DataType] = {
    "prompt": pa.string(),
    "prompt_token_ids": pa.list_(pa.int32()),
    "num_input_tokens": pa.int64(),
    "generated_tokens": pa.list_(pa.int32()),
    "generated_text": pa.string(),
    "num_generated_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "stop_reason": pa.string(),
    "cumulative_logprob": pa.float64(),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "prompt_token_id_logprobs": pa.list_(pa.list_(pa.float32())),
    "embeddings": pa.list_(pa.float32()),
    "metrics": _METRICS,
    "request_id": pa.int64(),
    "batch_uuid": pa.string(),
    "time_taken_llm": pa.float64(),
    "params": pa.string(),
    "outputs": pa.list_(_CHOICE),
    ERROR_COLUMN: pa.string(),
}
# A conversation's messages may differ in form from row to row, and are pickled then.
_ANY_FORM = ("messages",)
# Of rows that ask for them alone.
ASKED_COLUMNS = {"outputs", "prompt_token_id_logprobs"}


# The same of a row of a pooling model.
POOLED_COLUMNS: dict[str, pa.DataType] = {
    "prompt": pa.string(),
    "prompt_token_ids": pa.list_(pa.int32()),
    "num_input_tokens": pa.int64(),
    "embeddings": pa.list_(pa.float32()),
    "probs": pa.list_(pa.float32()),
    "score": pa.float64(),
    "request_id": pa.int64(),
    "batch_uuid": pa.string(),
    "time_taken_llm": pa.float64(),
    "params": pa.string(),
    ERROR_COLUMN: pa.string(),
}


class OutputRows:
    """Collects a block's finished rows and makes their table.

    Args:
        source: The dataset's own columns.
        inputs: The same, as rows.
        keep_all: Whether there is no `postprocess`, so that every engine column is part of the schema.
        with_error: Whether good rows say that they are (`__inference_error__` is then part of the schema).
        wanted: The columns and types that the user asked for; None takes what good rows have.
        known: The schema of an earlier block, for one without a good row.
        engine_columns: What the engine adds to a row.
    """

    def __init__(
        self,
        source: pa.Table,
        inputs: list[Row],
        *,
        keep_all: bool,
        with_error: bool,
        wanted: pa.Schema | None = None,
        known: pa.Schema | None = None,
        engine_columns: Mapping[str, pa.DataType] = OUTPUT_COLUMNS,
    ) -> None:
        self.inputs = inputs
        self.errors: list[str | None] = []
        self._source = source
        self._rows: list[Row] = []
        self._keep_all = keep_all
        self._with_error = with_error
        self._wanted = None if wanted is None else _with_error_column(wanted, with_error)
        self._known = known
        self._engine_columns = engine_columns

    def add(self, row: Row) -> None:
        """Append a finished row.

        Raises:
            Exception: when it does not fit the columns that the user asked for.
        """
        if self._with_error:
            row.setdefault(ERROR_COLUMN, "")
        if self._wanted is not None:
            row = _fitted(row, self._wanted)
        self._rows.append(row)
        self.errors.append(None)

    def add_error(self, columns: Row, error: str) -> None:
        """Append a row that failed, with what is known of its columns."""
        # Text that failed for being half a character would fail the block here.
        held = {name: value for name, value in columns.items() if why_too_deep(value) is None}
        held = {name: value for name, value in held.items() if self._holds(name, value)}
        self._rows.append({**held, ERROR_COLUMN: error})
        self.errors.append(error)

    def refuse_unwritable(self) -> dict[int, str]:
        """Make error rows of those with a value that no table can hold, such as a lock; which, and why."""
        refused = {index: error for index, row in enumerate(self._rows) if (error := _why_unwritable(row)) is not None}
        self._give_up(refused)
        for name in _keys(self._rows):
            own = self._source.column(name) if name in self._source.column_names else None
            odd = self._odd(name, [row.get(name) for row in self._rows], own) if None in self.errors else {}
            causes = {index: _failure(name, cause) for index, cause in odd.items()}
            self._give_up(causes)
            refused |= causes
        return refused

    def _give_up(self, refused: Mapping[int, str]) -> None:
        for index, error in refused.items():
            self.errors[index] = self.errors[index] or error
            self._rows[index] = {**self.inputs[index], ERROR_COLUMN: self.errors[index]}

    def to_table(self) -> pa.Table:
        """All rows as one table, error rows in the schema of good ones."""
        good = None in self.errors
        schema = self._wanted or (self._known if not good and not self._keep_all else None)
        if schema is not None:
            return pa.table([self._of_type(field.name, field.type) for field in schema], schema=schema)
        columns = {name: self._column(name) for name in self._names()}
        return pa.table(columns)

    def _holds(self, name: str, value: Any) -> bool:
        kind = None if name in self._source.column_names else self._engine_columns.get(name)
        return kind is None or _fits(_plain_or_same(name, value), kind)

    def _names(self) -> list[str]:
        if self._keep_all:
            names = _keys(self._rows)
            made = [name for name in names if name not in self._engine_columns]
            engine = [name for name in self._engine_columns if name not in ASKED_COLUMNS or name in names]
            return list(dict.fromkeys([*self._source.column_names, *made, *engine]))
        good = [row for row, error in zip(self._rows, self.errors, strict=True) if error is None]
        return _keys(good) if good else [*self._source.column_names, ERROR_COLUMN]

    def _column(self, name: str) -> pa.ChunkedArray:
        values = [row.get(name) for row in self._rows]
        own = self._source.column(name) if name in self._source.column_names else None
        if own is not None and self._unchanged(name, values, own.type):
            return own
        if name in self._engine_columns:
            typed = _typed(name, values, self._engine_columns[name])
            if typed is not None:
                return typed
        good = [value for value, error in zip(values, self.errors, strict=True) if error is None]
        if 0 < len(good) < len(values):
            # A failed row has the values of the dataset's columns, which may be of another type than good rows make.
            kind = _made(name, good).type
            values = [
                value if error is None or _fits(value, kind) else None
                for value, error in zip(values, self.errors, strict=True)
            ]
        made = _made(name, values)
        if is_suspect(made.type):
            odd = self._odd(name, values, own)
            if any(self.errors[index] is None for index in odd):
                raise UnstorableError(name)
            made = _made(name, [None if index in odd else value for index, value in enumerate(values)])
        return made if own is None else _alike(made, own.type)

    def _odd(self, name: str, values: Sequence[Any], own: pa.ChunkedArray | None) -> dict[int, str]:
        """Why the values of some rows cannot be in one column with the others."""
        known = {
            index: _plain_or_same(name, value)
            for index, value in enumerate(values)
            if value is not None and (self.errors[index] is None or None not in self.errors)
        }
        odd = {index: cause for index, value in known.items() if (cause := why_unstorable(value)) is not None}
        if odd or name in _ANY_FORM or (own is not None and is_suspect(own.type)):
            return odd
        return {index: _unlike(known[index], kind) for index, kind in odd_values(name, known).items()}

    def _of_type(self, name: str, kind: pa.DataType) -> pa.Array:
        plain = [_plain_or_same(name, row.get(name)) for row in self._rows]
        return pa.array([value if _fits(value, kind) else None for value in plain], type=kind)

    def _unchanged(self, name: str, values: Sequence[Any], kind: pa.DataType) -> bool:
        if not all(value is row[name] for value, row in zip(values, self.inputs, strict=True)):
            return False
        # `postprocess` may have changed a list or dict in place: compare with a fresh copy. Arrays don't compare.
        if self._keep_all or not _is_mutable(kind):
            return True
        return not isinstance(kind, pa.BaseExtensionType) and bool(self._source.column(name).to_pylist() == values)


def _why_unwritable(row: Row) -> str | None:
    for name, value in row.items():
        cause = why_unstorable(value)
        try:
            if cause is None:
                columns_to_arrow({name: [_plain_or_same(name, value)]})
        except Exception:
            cause = f"is a {type(value).__name__}, which no table can hold"
        if cause is not None:
            return _failure(name, cause)
    return None


def _unlike(value: object, kind: pa.DataType) -> str:
    wanted = textwrap.shorten(str(kind), 200, placeholder=" ...")
    return f"is a {type(value).__name__} that no table holds beside the other rows' {wanted}: return one type, or text"


def _failure(name: str, cause: str) -> str:
    return describe_failure(TypeError(f"the column {name!r} {cause}"), "output")


def _with_error_column(schema: pa.Schema, with_error: bool) -> pa.Schema:
    if not with_error or ERROR_COLUMN in schema.names:
        return schema
    return schema.append(pa.field(ERROR_COLUMN, pa.string()))


def _fitted(row: Row, schema: pa.Schema) -> Row:
    for name in row:
        if name not in schema.names:
            raise ValueError(
                f"the column {name!r} is not in output_schema, which has {', '.join(schema.names)}: "
                "add it there, or leave it out of what postprocess returns"
            )
    for field in schema:
        value = _plain_or_same(field.name, row.get(field.name))
        if not _fits(value, field.type):
            raise TypeError(f"{field.name}={value!r} does not fit output_schema's {field.type}")
    return row


def _fits(value: object, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if type(value) is str and not value.isascii():
        pass  # it may hold half a character
    elif type(value) in (str, int, float, bool) and _SCALARS.get(type(value), _never)(kind):
        return True
    try:
        pa.array([value], type=kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError):
        return False
    return True


def _never(kind: pa.DataType) -> bool:
    return False


# What needs no trial: a microsecond each otherwise.
_SCALARS = {str: pat.is_string, float: pat.is_float64, bool: pat.is_boolean}


def _plain_or_same(name: str, value: Any) -> Any:
    if value is None or name not in OUTPUT_COLUMNS:
        return value
    try:
        return _plain(name, value)
    except (TypeError, KeyError, AttributeError):  # `postprocess` put something else under the name
        return value


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_mutable(kind: pa.DataType) -> bool:
    return bool(pat.is_nested(kind) or isinstance(kind, pa.BaseExtensionType))


def _typed(name: str, values: Sequence[Any], kind: pa.DataType) -> pa.ChunkedArray | None:
    """The values in the engine's own type; None when `postprocess` put something else under the name."""
    try:
        plain = [None if value is None else _plain(name, value) for value in values]
        return pa.chunked_array([pa.array(plain, type=kind)])
    except (pa.ArrowException, TypeError, ValueError, OverflowError, KeyError, AttributeError):
        return None


def _made(name: str, values: list[Any]) -> pa.ChunkedArray:
    """The values as Ray Data types them, the same whether or not some are null."""
    present = [value for value in values if value is not None]
    if 0 < len(present) < len(values):
        # Ray Data pickles a column of times with a null in it, which other blocks' times cannot be written beside.
        made = columns_to_arrow({name: present}).column(0)
        if not isinstance(made.type, pa.BaseExtensionType):  # of those it reads no nulls
            numbers = iter(range(len(present)))
            return made.take(pa.array([None if value is None else next(numbers) for value in values], pa.int64()))
    return columns_to_arrow({name: values}).column(0)


def _plain(name: str, value: Any) -> Any:
    """A stop token's id as text, and what is keyed by token id as a list: Arrow has one type a column."""
    if name == "stop_reason":
        return str(value)
    if name in ("logprobs", "prompt_logprobs"):
        return [
            None if position is None else [{"token_id": token_id, **entry} for token_id, entry in position.items()]
            for position in value
        ]
    if name == "outputs":
        return [
            {**choice, **{key: _plain(key, choice[key]) for key in _KEYED if choice[key] is not None}}
            for choice in value
        ]
    return value


def _alike(made: pa.ChunkedArray, own: pa.DataType) -> pa.ChunkedArray:
    """In the type of the dataset's column where that says the same, so that all blocks have one schema."""
    families = (pat.is_integer, pat.is_boolean, _is_text, _is_bytes, pat.is_timestamp)
    related = pat.is_null(made.type) or any(family(made.type) and family(own) for family in families)
    try:
        if pat.is_dictionary(own) and _is_text(own.value_type) and _is_text(made.type):
            return made.dictionary_encode().cast(own)
        return made.cast(own) if related else made
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return made


def _is_text(kind: pa.DataType) -> bool:
    return bool(pat.is_string(kind) or pat.is_large_string(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pat.is_binary(kind) or pat.is_large_binary(kind))
