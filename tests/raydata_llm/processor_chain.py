"""The three operators one after the other on one table, without a Ray session."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from raydata_llm.finish import FinishPlan, finish
from raydata_llm.prepare import prepare
from raydata_llm.prepare_plan import PreparePlan, RowFunction
from raydata_llm.replica import EngineFactory, Replica
from raydata_llm.row_payload import (
    CARRIED_COLUMN,
    OUTPUT_COLUMN,
    REQUEST_COLUMN,
    TICKET_COLUMN,
    Carried,
    RowRequest,
    append_cells,
    pack,
    row_error,
    unpack_column,
)
from tests.raydata_llm.processor_fakes import start_echo_engine


def prepared(table: pa.Table, model_source: str, **plan: Any) -> tuple[list[RowRequest], list[Carried]]:
    """What the first operator makes of a table."""
    result = prepare(table, PreparePlan(model_source=model_source, **plan))
    assert result.drop_columns([REQUEST_COLUMN, TICKET_COLUMN, CARRIED_COLUMN]).equals(table)
    return unpack_column(result, REQUEST_COLUMN), unpack_column(result, CARRIED_COLUMN)


def answered(
    table: pa.Table,
    model_source: str,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    *,
    keep_going: bool = False,
    detokenize: bool = True,
    output_schema: pa.Schema | None = None,
    engine_factory: EngineFactory = start_echo_engine,
    **plan: Any,
) -> pa.Table:
    """What all three make of a table."""
    preparing = PreparePlan(model_source=model_source, preprocess=preprocess, keep_going=keep_going, **plan)
    finishing = FinishPlan(
        model_source=model_source,
        postprocess=postprocess,
        keep_going=keep_going,
        detokenize=detokenize,
        output_schema=output_schema,
    )
    return finish(replied(prepare(table, preparing), engine_factory, keep_going=keep_going), finishing)


def replied(table: pa.Table, engine_factory: EngineFactory, *, keep_going: bool) -> pa.Table:
    """What the second operator makes of a prepared table, with a replica in this process."""
    replica = Replica("m", {}, engine_factory)
    replica.start()
    requests: list[RowRequest] = unpack_column(table, REQUEST_COLUMN)
    outputs: dict[int, bytes | None] = {
        number: None for number, request in enumerate(requests) if request.error is not None
    }
    replica.feed([(number, (77, pack(request))) for number, request in enumerate(requests) if number not in outputs])
    while len(outputs) < len(requests):
        for outcome in replica.collect(1.0).outcomes:
            if outcome.error is not None and not keep_going:
                raise row_error(table.slice(outcome.row_id, 1).to_pylist()[0], outcome.error)
            outputs[outcome.row_id] = outcome.cell
    cells = [outputs[number] for number in range(len(requests))]
    return append_cells(table.drop_columns([TICKET_COLUMN]), OUTPUT_COLUMN, cells)


def params_of(row: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that reached the engine."""
    params: dict[str, Any] = json.loads(row["params"])
    return params
