"""One file, or one of answers and one of error rows, from finished blocks: what a write task does.

Runs on a worker, and may run again there or elsewhere after it was cut at any point: its files' names are given, so it
replaces its own files and no others. Owns the split into answers and errors. Knows the ledger, not the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydata_llm.ledger import Ledger
from raydata_llm.ledger_layout import DamagedLedgerError, file_name, is_error_file
from raydata_llm.resume import Carried, read_carried
from raydata_llm.resume_broker import BrokerHandle, Claimant
from raydata_llm.row_payload import ERROR_COLUMN, RESERVED_COLUMNS, RESUME_COLUMN
from raydata_llm.sink_errors import first_line
from raydata_llm.sink_format import FileFormat, concat_blocks, conform, merge_schemas
from raydata_llm.sink_storage import Storage

_Result = TypeVar("_Result")


class WrittenFile(NamedTuple):
    """A file that counts.

    Args:
        num_failed: Of its rows.
        is_error: It holds nothing but rows that failed.
    """

    name: str
    rows: int
    num_failed: int
    size: int
    block_bytes: int
    schema: pa.Schema | None
    is_error: bool


@dataclass(frozen=True, kw_only=True)
class WritePlan:
    """What all write tasks of a run are told.

    Args:
        storage: Where answers go.
        letters: Where error rows go; None leaves them among the answers.
        format: The files'.
        token: The run's, part of its files' names.
        ledger: Of a run that can be resumed.
    """

    storage: Storage
    letters: Storage | None
    format: FileFormat
    token: str
    ledger: Ledger | None = None


def write_file(
    plan: WritePlan, number: int, schema: pa.Schema | None, broker: BrokerHandle | None, blocks: Sequence[pa.Table]
) -> list[WrittenFile]:
    """Write blocks as file `number` of the run.

    Args:
        plan: The run's.
        number: The file's.
        schema: Of the files so far.
        broker: Of a run that can be resumed.
        blocks: With the reserved column, if the run can be resumed.

    Raises:
        ValueError: for rows that do not fit the schema, or lack the reserved column.
        OSError: when the store cannot be written.
    """
    blocks = [block for block in blocks if block.num_rows]
    if not blocks:
        return []
    table = concat_blocks(blocks)
    carried = _carried(table, plan)
    if carried is not None and broker is not None:
        broker.write(number, carried.numbers.tobytes())
    if carried is not None and broker is not None and not carried.admitted.all():
        # Blocks that were made before this run began (a materialised dataset): nobody asked for them yet.
        done = broker.claim(Claimant("write", number, 0), carried.keys) & ~carried.admitted
        table, carried = table.filter(pa.array(~done)), carried.keep(~done)
    failed = _failed(table, carried)
    apart = failed if plan.letters is not None else np.zeros_like(failed)
    table = table.drop_columns([name for name in RESERVED_COLUMNS if name in table.column_names])
    answers, letters = (file_name(plan.token, number, plan.format.suffix, errors=errors) for errors in (False, True))
    # An attempt before this one may have left files, and seen other rows fail if its blocks were lost and made again.
    # In this order no row is in both at any moment.
    if plan.letters is not None:
        _withdraw(plan, letters)
    if plan.ledger is not None:
        _withdraw(plan, answers)  # a file of the same size and other rows would be taken for what the new entry says
    written = []
    for name, chosen in ((answers, ~apart), (letters, apart)):
        if chosen.any():
            part = table if chosen.all() else table.filter(pa.array(chosen))
            keys = None if carried is None else carried.keep(chosen)
            written.append(_write_part(plan, name, part, schema, keys, num_failed=int(failed[chosen].sum())))
        elif name == answers:
            _withdraw(plan, name)
    return written


def rewrite_file(plan: WritePlan, file: WrittenFile, schema: pa.Schema) -> None:
    """Bring a Parquet file that counts to another schema."""
    table = conform(read_parquet(plan, file.name, pq.read_table), schema)
    if plan.ledger is not None:
        keys = plan.ledger.keys_of(file.name)
        plan.ledger.replace(file.name, plan.format.encode(table, keys), keys)
    else:
        _folder(plan, file.name).put(file.name, plan.format.encode(table))


def read_parquet(plan: WritePlan, name: str, read: Callable[[Any], _Result]) -> _Result:
    """Read something of a Parquet file that counts.

    Raises:
        DamagedLedgerError: when it is no Parquet file any more; says what to do.
        OSError: when the store fails.
    """
    storage = _folder(plan, name)
    try:
        with storage.open_file(name) if plan.ledger is None else plan.ledger.open_file(name) as source:
            return read(source)
    except (pa.ArrowException, OSError):
        # pyarrow has one error for a store's faults and for bytes that mean nothing: the store's show here once more.
        content = storage.get(name) if plan.ledger is None else plan.ledger.get_file(name)
    try:
        return read(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        remedy = "restore it" if plan.ledger is None else f"delete {name!r} and run again, which does its rows anew"
        raise DamagedLedgerError(
            f"{name!r} in {storage.label!r} is damaged, and no Parquet file any more ({first_line(error)}): {remedy}"
        ) from None


def _write_part(
    plan: WritePlan,
    name: str,
    table: pa.Table,
    schema: pa.Schema | None,
    carried: Carried | None,
    *,
    num_failed: int,
) -> WrittenFile:
    if plan.format.has_schema:
        schema = merge_schemas([schema or table.schema, table.schema])
        table = conform(table, schema)
    else:
        schema = None
    content = plan.format.encode(table, None if carried is None else carried.keys)
    _put(plan, name, content, carried)
    return WrittenFile(name, table.num_rows, num_failed, content.size, table.nbytes, schema, is_error_file(name))


def _put(plan: WritePlan, name: str, content: pa.Buffer, carried: Carried | None) -> None:
    if plan.ledger is not None:
        assert carried is not None, "a ledger's rows carry their keys"
        plan.ledger.commit(name, content, carried.keys)
        return
    _folder(plan, name).put(name, content)


def _withdraw(plan: WritePlan, name: str) -> None:
    if plan.ledger is not None:
        plan.ledger.withdraw(name)
    elif _folder(plan, name).size(name) is not None:
        _folder(plan, name).delete(name)


def _folder(plan: WritePlan, name: str) -> Storage:
    return plan.letters if plan.letters is not None and is_error_file(name) else plan.storage


def _carried(table: pa.Table, plan: WritePlan) -> Carried | None:
    if plan.ledger is None:
        return None
    if RESUME_COLUMN not in table.column_names:
        raise ValueError(
            f"the rows lack the column {RESUME_COLUMN!r}, by which a job is resumed: keep it in what comes between the "
            "processor and the sink (the sink takes it out), or put those steps into postprocess"
        )
    return read_carried(table.column(RESUME_COLUMN), plan.token)


def _failed(table: pa.Table, carried: Carried | None) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if carried is not None:
        return carried.failed
    if ERROR_COLUMN not in table.column_names:
        return np.zeros(table.num_rows, np.bool_)
    return np.array([bool(error) for error in table.column(ERROR_COLUMN).to_pylist()], np.bool_)
