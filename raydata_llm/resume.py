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

from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.resume_broker import current_broker
from raydata_llm.resume_config import ResumeConfig
from raydata_llm.row_key import row_digest
from raydata_llm.row_payload import RESUME_COLUMN, RowRequest

# A dataset's context holds the processor's plan under this name, for the sink to find.
PLAN_SETTING = "raydata_llm.resume_plan"
_TOKEN_BYTES = 8
_CELL_BYTES = KEY_BYTES + _TOKEN_BYTES + 1
_NO_TOKEN = b"-" * _TOKEN_BYTES


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
        return _digest(json.dumps({**self.about, "key_column": self.config.key_column}, sort_keys=True).encode()).hex()[
            :16
        ]

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
        cells = [keys[start : start + KEY_BYTES] + token + b"\0" for start in range(0, len(keys), KEY_BYTES)]
        table = table.append_column(RESUME_COLUMN, pa.array(cells, pa.binary()))
        return table if broker is None else table.filter(pa.array(~broker.done_before(keys)))

    def _key(self, request: RowRequest, row: Mapping[str, Any], made: Mapping[str, Any]) -> bytes:
        column = self.config.key_column
        if column is not None:
            columns = {**row, **made}
            if column not in columns:
                raise ValueError(
                    f"resume: key_column={column!r} is not a column: the row has {', '.join(map(str, columns))}"
                )
            return _digest(row_digest({"key": columns[column]}))
        token_ids = (
            b"" if request.prompt_token_ids is None else np.ascontiguousarray(request.prompt_token_ids).tobytes()
        )
        # The dataset's own columns too: two rows with one prompt are two rows, and one's answer is not the other's.
        return _digest(_digest(token_ids) + row_digest({"sampling_params": request.sampling_params}) + row_digest(row))


class Carried(NamedTuple):
    """The reserved column of a block, read.

    Args:
        keys: Concatenated.
        admitted: For each row, whether the run of that token let it through.
        failed: For each row, whether it is an error row.
    """

    keys: bytes
    admitted: np.ndarray[Any, np.dtype[np.bool_]]
    failed: np.ndarray[Any, np.dtype[np.bool_]]

    def keep(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Carried:
        """Of the chosen rows."""
        keys = np.frombuffer(self.keys, f"V{KEY_BYTES}")[chosen].tobytes()
        return Carried(keys, self.admitted[chosen], self.failed[chosen])


def mark_failed(column: pa.ChunkedArray, failed: Sequence[bool]) -> pa.Array:
    """The reserved column, saying which rows are error rows."""
    cells = column.to_pylist()
    return pa.array([cell[:-1] + bytes([bad]) for cell, bad in zip(cells, failed, strict=True)], pa.binary())


def read_carried(column: pa.ChunkedArray, token: str) -> Carried:
    """Read the reserved column.

    Args:
        column: Of a finished block.
        token: Of the run that asks.
    """
    cells = column.to_pylist()
    assert all(len(cell) == _CELL_BYTES for cell in cells), "made by `admit`"
    keys = b"".join(cell[:KEY_BYTES] for cell in cells)
    admitted = np.array([cell[KEY_BYTES:-1] == token.encode() for cell in cells], np.bool_)
    return Carried(keys, admitted, np.array([bool(cell[-1]) for cell in cells], np.bool_))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
