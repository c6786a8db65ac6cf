"""Which rows a job has finished already: what makes two rows the same, and what a row carries to the sink.

Owns the key of a row and the reserved column. The `prepare` operator asks here which rows to skip, the
sink commits. Knows no store. Invariant: a row's key follows from what it asks and which row it is, never from where or
when it runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raydata_llm.ledger_index import KEY_BYTES, NAME_BYTES
from raydata_llm.ray_blocks import task_call, task_name
from raydata_llm.resume_broker import Claimant, current_broker
from raydata_llm.resume_config import ResumeConfig
from raydata_llm.row_key import row_digest
from raydata_llm.row_payload import RESUME_COLUMN, RowRequest

# A dataset's context holds the processor's plan under this name, for the sink to find.
PLAN_SETTING = "raydata_llm.resume_plan"
# Another number where rows get other keys than they had: a folder of older keys is written anew.
_KEYS = 3
# A cell: key, token of the run that let the row through, number of the row, whether it failed.
_TOKEN_BYTES, _NUMBER_BYTES = 8, 8
_TOKEN_END = KEY_BYTES + _TOKEN_BYTES
_CELL_BYTES = _TOKEN_END + _NUMBER_BYTES + 1
_NO_TOKEN = b"-" * _TOKEN_BYTES

Cells = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """What the operators and the sink are told.

    Args:
        config: The user's.
        about: What, beside the rows, decides the answers: the model's fingerprint, the engine's settings.
    """

    config: ResumeConfig
    about: Mapping[str, Any]

    @property
    def space(self) -> str:
        """The key space: results of another model or version never mix with these."""
        about = {**self.about, "key_column": self.config.key_column, "keys": _KEYS}
        return _digest(json.dumps(about, sort_keys=True).encode()).hex()[:16]

    def admit(
        self, table: pa.Table, requests: Sequence[RowRequest], rows: Sequence[Mapping[str, Any]], made: Sequence[Any]
    ) -> pa.Table:
        """The table's rows that are still to be done, with the reserved column.

        Args:
            table: A block whose rows have their requests.
            requests: The same requests.
            rows: The dataset's own columns of each row.
            made: What `preprocess` added to each.
        """
        keys = b"".join(map(self._key, requests, rows, made))
        broker = current_broker()
        token = _NO_TOKEN if broker is None else broker.token
        call = task_call()
        cells = np.zeros((len(made), _CELL_BYTES), np.uint8)
        cells[:, :KEY_BYTES] = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        cells[:, KEY_BYTES:_TOKEN_END] = np.frombuffer(token, np.uint8)
        numbers = _row_numbers(f"{task_name()} {call}", len(made))
        cells[:, _TOKEN_END:-1] = numbers.view(np.uint8).reshape(-1, _NUMBER_BYTES)
        table = table.append_column(RESUME_COLUMN, _to_column(cells))
        if broker is None:
            return table
        return table.filter(pa.array(~broker.claim(Claimant("prepare", *call), keys)))

    def _key(self, request: RowRequest, row: Mapping[str, Any], made: Mapping[str, Any]) -> bytes:
        column = self.config.key_column
        if column is not None:
            columns = {**row, **made}
            if column not in columns and request.error is not None:
                # `preprocess` failed before it made the key: the row is told from others as it came.
                return _digest(row_digest({"failed": dict(row)}))
            if column not in columns:
                raise ValueError(
                    f"resume: key_column={column!r} is not a column: the row has {', '.join(map(str, columns))}"
                )
            if columns[column] is None:
                # Null tells no row from another: else of two such rows one might be skipped for the other's answer.
                return _digest(row_digest({"without key": dict(row)}))
            name = _digest(row_digest({"key": columns[column]}))
            # The end tells rows of one key apart by the dataset's columns, where it turns out that there are such.
            return name[:NAME_BYTES] + _digest(row_digest(row))[NAME_BYTES:]
        token_ids = (
            b"" if request.prompt_token_ids is None else np.ascontiguousarray(request.prompt_token_ids).tobytes()
        )
        # The dataset's own columns too: two rows with one prompt are two rows, and one's answer is not the other's.
        asked: dict[str, Any] = {"sampling_params": request.sampling_params}
        if request.lora_request is not None:
            asked["lora"] = request.lora_request.lora_path
        if request.pooling_params is not None:
            asked["pooling_params"] = request.pooling_params
        if request.prompt_embeds is not None:
            asked["prompt_embeds"] = request.prompt_embeds
        return _digest(_digest(token_ids) + row_digest(asked) + row_digest(row))


class Carried(NamedTuple):
    """The reserved column of a block, read.

    Args:
        keys: Concatenated.
        numbers: Of each row as it left `prepare`: steps that multiply rows give one number to several.
        admitted: For each row, whether the run of that token let it through.
        failed: For each row, whether it is an error row.
    """

    keys: bytes
    numbers: np.ndarray[Any, np.dtype[np.uint64]]
    admitted: np.ndarray[Any, np.dtype[np.bool_]]
    failed: np.ndarray[Any, np.dtype[np.bool_]]

    def keep(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Carried:
        """Of the chosen rows."""
        keys = np.frombuffer(self.keys, f"V{KEY_BYTES}")[chosen].tobytes()
        return Carried(keys, self.numbers[chosen], self.admitted[chosen], self.failed[chosen])


def mark_failed(column: pa.ChunkedArray, failed: Sequence[bool]) -> pa.Array:
    """The reserved column, saying which rows are error rows."""
    cells = _to_cells(column).copy()
    cells[:, -1] = failed
    return _to_column(cells)


def read_carried(column: pa.ChunkedArray, token: str) -> Carried:
    """Read the reserved column.

    Args:
        column: Of a finished block.
        token: Of the run that asks.

    Raises:
        ValueError: when a row has none of the processor's cells.
    """
    cells = _to_cells(column)
    own = np.frombuffer(token.encode(), np.uint8)
    tokens = cells[:, KEY_BYTES:_TOKEN_END]
    admitted = (tokens == own).all(1) if own.size == _TOKEN_BYTES else np.zeros(len(cells), np.bool_)
    numbers = np.ascontiguousarray(cells[:, _TOKEN_END:-1]).view(np.uint64)[:, 0]
    return Carried(cells[:, :KEY_BYTES].tobytes(), numbers, admitted, cells[:, -1] != 0)


def _row_numbers(call: str, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Numbers of a block's rows: the same in a retry, and no other block's.

    Blocks begin at random places among 2**64 numbers: of a million blocks of 1,000 rows two overlap once in 10,000
    jobs.
    """
    first = int.from_bytes(_digest(call.encode())[:_NUMBER_BYTES], "little")
    return np.arange(count, dtype=np.uint64) + np.uint64(first)


def _to_column(cells: Cells) -> pa.Array:
    flat = pa.py_buffer(np.ascontiguousarray(cells))
    # Not of a fixed size: Ray Data's joins and pandas know plain bytes.
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(_CELL_BYTES), len(cells), [None, flat]).cast(pa.binary())


def _to_cells(column: pa.ChunkedArray) -> Cells:
    if column.null_count:
        raise ValueError(
            f"{column.null_count} rows have nothing in the column {RESUME_COLUMN!r}, by which a job is resumed: rows "
            "that are added after the processor (by a join or a union) cannot go into its folder; write them elsewhere"
        )
    fixed = column.cast(pa.binary(_CELL_BYTES))
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * _CELL_BYTES, chunk.offset * _CELL_BYTES)
        for chunk in fixed.chunks
        if len(chunk)
    ]
    flat = np.concatenate(chunks) if chunks else np.empty(0, np.uint8)
    return flat.reshape(-1, _CELL_BYTES)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
