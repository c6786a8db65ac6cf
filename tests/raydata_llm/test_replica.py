"""The second operator: from requests to outputs, one block in and one block out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm import replica as replica_module
from raydata_llm.engine.request import Request, RequestOutput, seeded_key
from raydata_llm.guarded_engine import EngineLostError, RunningEngine
from raydata_llm.replica import ENGINE_LOST_EXIT_CODE, Replica
from raydata_llm.row_payload import (
    BLOCK_COLUMN,
    OUTPUT_COLUMN,
    REQUEST_COLUMN,
    RowError,
    RowOutput,
    RowRequest,
    append_packed,
    open_block,
    unpack_column,
)
from tests.raydata_llm.processor_fakes import EchoEngine, start_echo_engine, start_nothing


def block(requests: Sequence[RowRequest]) -> pa.Table:
    return append_packed(pa.table({"id": range(len(requests))}), REQUEST_COLUMN, requests)


def request(*token_ids: int, error: str | None = None, **params: Any) -> RowRequest:
    return RowRequest(np.array(token_ids, np.int32) if token_ids else None, params, 77, error)


def outputs_of(table: pa.Table) -> list[RowOutput]:
    return unpack_column(table, OUTPUT_COLUMN)


def test_each_row_gets_its_own_output_and_keeps_its_columns() -> None:
    table = block([request(1, 2), request(error="KeyError: 'q' (preprocess)"), request(3, max_tokens=9)])
    result = Replica("m", {}, True, start_echo_engine)(table)
    assert result.column_names == ["id", OUTPUT_COLUMN]
    assert result.column("id").equals(table.column("id"))
    first, second, third = outputs_of(result)
    assert first.output is not None and first.output.outputs[0].token_ids == [2, 1]
    assert second.output is None and second.error == "KeyError: 'q' (preprocess)"
    assert json.loads(third.sampling_params) == {"max_tokens": 9, "temperature": 0.25}, (
        "the model's defaults lie beneath"
    )
    assert [output.request_id for output in (first, second, third)] == [0, 1, 2]


class Keys(EchoEngine):
    """Remembers the noise keys it is given."""

    def __init__(self) -> None:
        super().__init__({})
        self.keys: list[int] = []

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        self.keys += [request.key for request in requests]
        return super().generate(requests)


def test_a_rows_seed_replaces_its_key() -> None:
    engine = Keys()
    Replica("m", {}, False, lambda source, kwargs: (engine, {}))(block([request(1), request(1, seed=5)]))
    assert engine.keys == [77, seeded_key(5)]


def test_a_models_default_seed_counts_as_the_rows() -> None:
    engine = Keys()
    Replica("m", {}, False, lambda source, kwargs: (engine, {"seed": 6}))(block([request(1)]))
    assert engine.keys == [seeded_key(6)]


def test_bad_parameters_stop_the_block_before_anything_is_generated() -> None:
    engine = Keys()
    with pytest.raises(RowError, match=r"temperature=-1 is not valid.*\(sampling_params\).*'id': 1"):
        Replica("m", {}, False, lambda source, kwargs: (engine, {}))(block([request(1), request(1, temperature=-1)]))
    assert engine.keys == []


def test_blocks_of_several_threads_are_in_the_engine_together() -> None:
    engine = EchoEngine({})
    replica = Replica("m", {}, False, lambda source, kwargs: (engine, {}))
    blocks = [block([request(number, row) for row in range(5)]) for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(replica, blocks))
    for number, result in enumerate(results):
        outputs = [row.output.outputs[0] for row in outputs_of(result) if row.output is not None]
        assert [output.token_ids for output in outputs] == [[row, number] for row in range(5)]
    assert engine.most_at_once > 1
    ids = [output.request_id for result in results for output in outputs_of(result)]
    assert sorted(ids) == list(range(40))


def test_a_block_that_ray_data_might_cut_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = block([request(1, 2) for _ in range(50)])
    plain = Replica("m", {}, False, start_echo_engine)(table)
    monkeypatch.setattr(replica_module, "block_size_limit", lambda: 1000)
    sealed = Replica("m", {}, False, start_echo_engine)(table)
    assert sealed.column_names == [BLOCK_COLUMN] and sealed.num_rows == 1
    assert [o.output for o in outputs_of(open_block(sealed))] == [o.output for o in outputs_of(plain)]


@pytest.mark.parametrize("keep_going", [True, False])
def test_an_engine_that_does_not_start_is_every_blocks_error(keep_going: bool) -> None:
    replica = Replica("m", {}, keep_going, start_nothing)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^kv_cache_memory_bytes=1 is not valid: give 4096 or more"):
            replica(block([request(1)]))


def test_a_replica_whose_process_can_run_no_engine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(EchoEngine):
        def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
            raise EngineLostError("a new engine does not start: RuntimeError: CUDA error")

    def leave(code: int) -> None:
        raise SystemExit(code)

    def start(source: str, kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        return Lost(kwargs), {}

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    with pytest.raises(SystemExit) as left:
        Replica("m", {}, True, start)(block([request(1)]))
    assert left.value.code == ENGINE_LOST_EXIT_CODE


def test_the_engine_is_shut_down_with_the_replica() -> None:
    class Shut(EchoEngine):
        shut = False

        def shutdown(self) -> None:
            self.shut = True

    engine = Shut({})
    replica = Replica("m", {}, False, lambda source, kwargs: (engine, {}))
    del replica
    assert engine.shut
