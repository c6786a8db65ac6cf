"""One engine: packed requests in, packed outputs out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine.request import Request, RequestOutput, seeded_key
from raydata_llm.replica import EngineFactory, Replica
from raydata_llm.row_payload import RowOutput, RowRequest, pack, unpack
from tests.raydata_llm.processor_fakes import EchoEngine, serve, start_echo_engine, start_nothing


def request(*token_ids: int, **params: Any) -> bytes:
    return pack(RowRequest(np.array(token_ids, np.int32), params, b"d" * 16))


def started(factory: EngineFactory = start_echo_engine) -> Replica:
    replica = Replica("m", {}, factory)
    assert replica.start() == 64
    return replica


def outputs_of(replica: Replica, cells: Sequence[bytes]) -> dict[int, RowOutput]:
    replica.feed([(number, (77, cell)) for number, cell in enumerate(cells)])
    outputs: dict[int, RowOutput] = {}
    while len(outputs) < len(cells):
        for outcome in replica.collect(5.0).outcomes:
            assert outcome.row_id not in outputs, "collected once"
            outputs[outcome.row_id] = unpack(outcome.cell)
            assert outcome.error == outputs[outcome.row_id].error
    return outputs


def test_each_row_gets_its_own_output() -> None:
    outputs = outputs_of(started(), [request(1, 2), request(3, max_tokens=9)])
    assert isinstance(outputs[0].output, RequestOutput) and outputs[0].output.outputs[0].token_ids == [2, 1]
    assert json.loads(outputs[1].sampling_params) == {"max_tokens": 9, "temperature": 0.25}, (
        "the model's defaults lie beneath"
    )
    assert [outputs[row].request_id for row in (0, 1)] == [0, 1]


class Keys(EchoEngine):
    """Remembers the noise keys it is given."""

    def __init__(self) -> None:
        super().__init__({})
        self.keys: list[int] = []

    def add_request(self, request: Request) -> None:
        self.keys.append(request.key)
        super().add_request(request)


@pytest.mark.parametrize(
    ("defaults", "expected"), [({}, [77, seeded_key(5, [1])]), ({"seed": 6}, [seeded_key(6, [1])] * 2)]
)
def test_a_rows_or_a_models_seed_replaces_its_key(defaults: Mapping[str, Any], expected: list[int]) -> None:
    engine = Keys()
    given = [request(1), request(1, seed=6 if defaults else 5)]
    outputs_of(started(lambda source, kwargs: (serve(engine), defaults)), given)
    assert engine.keys == expected


def test_bad_parameters_fail_their_row_alone() -> None:
    outputs = outputs_of(started(), [request(1), request(1, temperature=-1), request(2)])
    assert "temperature=-1 is not valid" in (outputs[1].error or "")
    assert outputs[0].output is not None and outputs[2].output is not None


def _refuse() -> None:
    raise RuntimeError("no such thing on this node")


class Unreadable:
    """Can be packed, but not unpacked."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _refuse, ()


def test_a_row_that_cannot_be_unpacked_fails_alone() -> None:
    outputs = outputs_of(started(), [request(1), request(1, extra_args={"thing": Unreadable()}), request(2)])
    assert outputs[1].error == "RuntimeError: no such thing on this node (sampling_params)"
    assert outputs[0].output is not None and outputs[2].output is not None


def test_a_row_that_the_engine_refuses_is_its_error() -> None:
    outputs = outputs_of(started(), [request(*range(300)), request(1)])
    assert "max_model_len=200 allows fewer (engine)" in (outputs[0].error or "") and outputs[1].error is None


def test_an_engine_that_does_not_start_says_why() -> None:
    with pytest.raises(ValueError, match=r"^kv_cache_memory_bytes=1 is not valid: give 4096 or more"):
        Replica("m", {}, start_nothing).start()


class Mortal(EchoEngine):
    """Dies of the token 666."""

    def step(self) -> list[RequestOutput]:
        if any(666 in request.prompt_token_ids for request in self._running):
            raise RuntimeError("poison")
        return super().step()


def test_the_engines_death_is_told() -> None:
    replica = started(lambda source, kwargs: (serve(Mortal({})), {}))
    assert len(outputs_of(replica, [request(1)])) == 1
    replica.feed([(1, (77, request(666))), (2, (77, request(3)))])
    patience = time.monotonic() + 30
    while (collected := replica.collect(0.1)).death is None and time.monotonic() < patience:
        assert not collected.outcomes
    assert collected.death == "RuntimeError: poison"
    replica.feed([(3, (77, request(3)))])
    assert replica.collect(0.1).outcomes == []
