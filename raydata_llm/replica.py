"""The second operator: one engine in one pool actor, fed from all blocks in flight.

Owns the engine's life inside the actor and the translation of row requests to engine requests. Runs in several
threads at once, one a block; the engine's own thread mixes their rows. Knows no text. Invariants: a task gives back
exactly one block (Ray Data replays retried tasks by block number), its rows in the order they came.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from raydata_llm.engine.phases import announce
from raydata_llm.engine.request import Request, RequestOutput, seeded_key
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.guarded_engine import EngineLostError, GuardedEngine, RunningEngine
from raydata_llm.job_link import StatsSender
from raydata_llm.ray_blocks import block_rows, block_size_limit
from raydata_llm.replica_sampler import ReplicaSampler
from raydata_llm.row_payload import (
    OUTPUT_COLUMN,
    REQUEST_COLUMN,
    RowOutput,
    RowRequest,
    append_packed,
    describe_failure,
    pack,
    row_error,
    seal_block,
    unpack_column,
)

logger = logging.getLogger(__name__)

# What a replica leaves with when its process can run no engine any more (a CUDA context is lost for good, say): Ray
# starts a fresh process and sends its blocks again.
ENGINE_LOST_EXIT_CODE = 70

# Different sampling parameters remembered at once.
_KNOWN_PARAMS = 1024

EngineFactory = Callable[[str, Mapping[str, Any]], tuple[RunningEngine, Mapping[str, Any]]]


def start_engine(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    """Load the model and start its engine; returns it with the model's default sampling parameters.

    Raises:
        ValueError: when the model or the device cannot meet the settings.
    """
    # Read by OpenMP when torch is imported. Its threads spin while they wait, and on a CPU that the feeding tasks share
    # a spinning thread keeps the one it waits for from running: a step of 64 rows took 10 to 50 s instead of 1 to 4.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_config import EngineConfig
    from raydata_llm.engine.engine_thread import EngineThread
    from raydata_llm.model_source import resolve_model
    from raydata_llm.tokenizer import load_tokenizer

    load_format = EngineConfig.from_mapping(model_source, engine_kwargs).load_format
    announce("fetching the model")
    path = resolve_model(model_source, load_format=load_format)
    config = EngineConfig.from_mapping(path, engine_kwargs)
    engine = Engine(config, load_tokenizer(path, trust_remote_code=config.trust_remote_code))
    return EngineThread(engine), engine.default_sampling_params


class _Params(NamedTuple):
    """Checked sampling parameters, and the same as JSON."""

    value: SamplingParams
    text: str


class _Asked(NamedTuple):
    """A row's request, and its parameters as JSON."""

    request: Request
    params: str


class Replica:
    """The callable that Ray Data puts into each actor of the pool.

    Args:
        model_source: The model, as the user named it.
        engine_kwargs: The engine's settings on this pool.
        keep_going: Turn failures into error rows instead of raising.
        engine_factory: For tests.
        stats_sender: To whom the replica tells how it fares.
    """

    def __init__(
        self,
        model_source: str,
        engine_kwargs: Mapping[str, Any],
        keep_going: bool,
        engine_factory: EngineFactory = start_engine,
        stats_sender: StatsSender | None = None,
    ) -> None:
        self._sampler = ReplicaSampler(stats_sender or StatsSender())
        self._keep_going = keep_going
        self._numbers = itertools.count()
        self._known_params: dict[bytes, _Params] = {}
        self._engine: GuardedEngine | None = None
        self._start_error: Exception | None = None
        # Raised by the first block, not here: an actor that dies while it starts is reported by Ray Data as an
        # internal fault of its own, with pages of its stack; an error of a task shows its cause.
        try:
            with self._sampler.starting():
                self._engine = GuardedEngine(functools.partial(engine_factory, model_source, engine_kwargs))
            self._sampler.watch(self._engine.stats)
        except Exception as error:
            logger.exception("The engine did not start")
            self._start_error, self._start_traceback = error, error.__traceback__

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run a block's requests and append their outputs.

        Raises:
            RowError: for a row that fails, unless rows may.
            ValueError: when the engine could not start.
        """
        engine = self._running_engine()
        entries = [self._request(row, engine) for row in unpack_column(table, REQUEST_COLUMN)]
        self._check(table, entries)
        with self._sampler.block(len(entries)):
            outputs = self._run(entries, engine)
            self._sampler.count(output.output for output in outputs)
        self._check(table, outputs)
        table = append_packed(table.drop_columns([REQUEST_COLUMN]), OUTPUT_COLUMN, outputs)
        return seal_block(table, block_size_limit())

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown()

    def _running_engine(self) -> GuardedEngine:
        if self._start_error is not None:
            # With the traceback of the start alone: several threads raise this, each would add its own.
            raise self._start_error.with_traceback(self._start_traceback)
        assert self._engine is not None, "started, or its error was kept"
        return self._engine

    def _request(self, row: RowRequest, engine: GuardedEngine) -> _Asked | RowOutput:
        number = next(self._numbers)
        if row.error is not None or row.prompt_token_ids is None:
            return RowOutput(None, "", number, 0.0, row.error)
        try:
            params = self._params(row.sampling_params, engine)
        except Exception as error:
            return RowOutput(None, "", number, 0.0, describe_failure(error, "sampling_params"))
        seed = params.value.seed
        request = Request(
            request_id=str(number),
            prompt_token_ids=row.prompt_token_ids,
            sampling_params=params.value,
            key=row.key if seed is None else seeded_key(seed),
        )
        return _Asked(request, params.text)

    def _params(self, given: Any, engine: GuardedEngine) -> _Params:
        # Most rows ask alike, and this thread shares its interpreter with the engine's: 150 us a row without this.
        given_bytes = pack(given)
        known = self._known_params.get(given_bytes)
        if known is None:
            params = SamplingParams.from_mapping(given, engine.default_sampling_params)
            known = _Params(params, json.dumps(params.to_mapping(), sort_keys=True))
            if len(self._known_params) >= _KNOWN_PARAMS:
                self._known_params.clear()
            self._known_params[given_bytes] = known
        return known

    def _run(self, entries: Sequence[_Asked | RowOutput], engine: GuardedEngine) -> list[RowOutput]:
        started = time.perf_counter()
        requests = [entry.request for entry in entries if isinstance(entry, _Asked)]
        try:
            finished = iter(engine.generate(requests))
        except EngineLostError:
            logger.exception("This replica ends; Ray starts a fresh one for its blocks")
            logging.shutdown()
            os._exit(ENGINE_LOST_EXIT_CODE)
        seconds = time.perf_counter() - started
        return [
            _row_output(entry, next(finished), seconds) if isinstance(entry, _Asked) else entry for entry in entries
        ]

    def _check(self, table: pa.Table, entries: Sequence[_Asked | RowOutput]) -> None:
        if self._keep_going:
            return
        for index, entry in enumerate(entries):
            if isinstance(entry, RowOutput) and entry.error is not None:
                raise row_error(block_rows(table.slice(index, 1))[0], entry.error)


def _row_output(asked: _Asked, output: RequestOutput, seconds: float) -> RowOutput:
    error = None if output.error is None else describe_failure(output.error, "engine")
    return RowOutput(None if error else output, asked.params, int(asked.request.request_id), seconds, error)
