"""The three operators one after the other on one table, without a Ray session."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from raydata_llm.finish import FinishPlan, finish
from raydata_llm.prepare import PreparePlan, RowFunction, prepare
from raydata_llm.replica import EngineFactory, Replica
from raydata_llm.row_payload import CARRIED_COLUMN, REQUEST_COLUMN, Carried, RowRequest, unpack_column
from tests.raydata_llm.processor_fakes import start_echo_engine


def prepared(table: pa.Table, model_source: str, **plan: Any) -> tuple[list[RowRequest], list[Carried]]:
    """What the first operator makes of a table."""
    result = prepare(table, PreparePlan(model_source=model_source, **plan))
    assert result.drop_columns([REQUEST_COLUMN, CARRIED_COLUMN]).equals(table)
    return unpack_column(result, REQUEST_COLUMN), unpack_column(result, CARRIED_COLUMN)


def answered(
    table: pa.Table,
    model_source: str,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    *,
    keep_going: bool = False,
    detokenize: bool = True,
    engine_factory: EngineFactory = start_echo_engine,
    **plan: Any,
) -> pa.Table:
    """What all three make of a table."""
    preparing = PreparePlan(model_source=model_source, preprocess=preprocess, keep_going=keep_going, **plan)
    finishing = FinishPlan(
        model_source=model_source, postprocess=postprocess, keep_going=keep_going, detokenize=detokenize
    )
    replica = Replica(model_source, {}, keep_going, engine_factory)
    return finish(replica(prepare(table, preparing)), finishing)


def params_of(row: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that reached the engine."""
    params: dict[str, Any] = json.loads(row["params"])
    return params
