"""One engine in an actor of its own: packed requests in, packed outputs out, row by row.

Owns the engine's life inside the process and the translation of a row's request to the engine's. Knows no text, no
blocks and no other replica: which rows it gets, and what happens to them when it dies, is the dispatcher's business.
Invariant: each row that was fed is collected once, or the engine's death is told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from raydata_llm.adapter_source import on_this_node
from raydata_llm.engine.phases import announce
from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.engine.pooling_request import PoolingOutput, PoolingRequest, PoolingRequestOutput
from raydata_llm.engine.request import Request, RequestOutput, TokenArray, seeded_key
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.job_link import StatsSender
from raydata_llm.openmp import wait_passively
from raydata_llm.pending_rows import Outcome
from raydata_llm.redaction import masked_errors, redact
from raydata_llm.replica_sampler import ReplicaSampler
from raydata_llm.row_payload import RowOutput, RowRequest, describe_failure, pack, unpack

if TYPE_CHECKING:
    from raydata_llm.engine.rank_launcher import LauncherFactory

AnyOutput = RequestOutput | PoolingRequestOutput[PoolingOutput]

# Different sampling parameters remembered at once.
_KNOWN_PARAMS = 1024
# Outputs are sent on together that finish within this time: a message costs both sides about a millisecond.
_GATHER_SECONDS = 0.02


class RunningEngine(Protocol):
    """An engine in a thread of its own, as `raydata_llm.engine.engine_thread.EngineThread`."""

    max_num_seqs: int

    def submit(self, requests: Sequence[Request | PoolingRequest], deliver: Callable[[Any], None]) -> None:
        """Run requests; each output is delivered as it finishes."""
        ...

    @property
    def death(self) -> BaseException | None:
        """What ended the engine."""
        ...

    @property
    def seconds_silent(self) -> float:
        """How long an engine with something to do has given no sign of life."""
        ...

    def stats(self) -> object | None:
        """The engine's counts; None from one that tells none."""
        ...

    def shutdown(self) -> None:
        """Free the device."""
        ...


EngineFactory = Callable[[str, Mapping[str, Any]], tuple[RunningEngine, Mapping[str, Any]]]


def start_engine(
    model_source: str, engine_kwargs: Mapping[str, Any], launch_ranks: LauncherFactory | None = None
) -> tuple[RunningEngine, Mapping[str, Any]]:
    """Load the model and start its engine; returns it with the model's default sampling parameters.

    Args:
        launch_ranks: What starts the ranks of an engine that has several; None: processes of this node.

    Raises:
        ValueError: when the model or the device cannot meet the settings.
    """
    wait_passively()
    announce("importing torch")
    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_config import EngineConfig
    from raydata_llm.engine.engine_thread import EngineThread
    from raydata_llm.engine.pooling_engine import PoolingEngine
    from raydata_llm.model_source import resolve_model
    from raydata_llm.tokenizer import load_tokenizer

    load_format = EngineConfig.from_mapping(model_source, engine_kwargs).load_format
    announce("fetching the model")
    path = resolve_model(model_source, load_format=load_format)
    config = EngineConfig.from_mapping(path, engine_kwargs)
    if config.runner == "pooling":
        return EngineThread(PoolingEngine(config)), {}
    tokenizer = None
    if not config.skip_tokenizer_init:
        announce("loading the tokenizer")
        tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    engine = Engine(config, tokenizer, launch_ranks) if launch_ranks else Engine(config, tokenizer)
    return EngineThread(engine), engine.default_sampling_params


class Collected(NamedTuple):
    """What a replica has to say: finished rows, and how its engine is.

    Args:
        outcomes: Rows that finished since the last time.
        seconds_silent: How long the engine, with something to do, has given no sign of life.
        death: Why the engine is dead, as `Type: message`.
    """

    outcomes: list[Outcome]
    seconds_silent: float
    death: str | None


class _Params(NamedTuple):
    """Checked sampling parameters, and the same as JSON."""

    value: SamplingParams
    text: str


class _FinishedRow(NamedTuple):
    """A row on its way out; packed by the thread that sends it, not by the engine's."""

    row_id: int
    output: RowOutput
    num_prompt: int
    num_tokens: int


class Replica:
    """What the dispatcher puts into each actor; its methods run in several threads at once.

    Args:
        model_source: The model, as the user named it.
        engine_kwargs: The engine's settings on this pool.
        engine_factory: For tests.
        stats_sender: To whom the replica tells how it fares.
    """

    def __init__(
        self,
        model_source: str,
        engine_kwargs: Mapping[str, Any],
        engine_factory: EngineFactory = start_engine,
        stats_sender: StatsSender | None = None,
    ) -> None:
        self._sampler = ReplicaSampler(stats_sender or StatsSender())
        self._start = (engine_factory, model_source, engine_kwargs)
        self._known_params: dict[bytes, _Params] = {}
        self._finished: list[_FinishedRow] = []
        self._arrival = threading.Condition()

    def where(self) -> tuple[str, int]:
        """The node's address and the process: answers as soon as the actor is placed."""
        import ray

        return str(ray.util.get_node_ip_address()), os.getpid()  # type: ignore[no-untyped-call]

    @masked_errors()
    def start(self) -> int:
        """Start the engine; returns how many rows it runs at once.

        Raises:
            ValueError: when the model or the device cannot meet the settings.
        """
        factory, model_source, engine_kwargs = self._start
        with self._sampler.starting():
            self._engine, self._default_sampling_params = factory(model_source, engine_kwargs)
        self._sampler.watch(self._engine.stats)
        return self._engine.max_num_seqs

    @masked_errors()
    def feed(self, rows: Sequence[tuple[int, tuple[int, bytes]]]) -> None:
        """Take rows, as (row id, (noise key, packed `RowRequest`))."""
        started = time.perf_counter()
        self._sampler.hold(len(rows))
        asked: dict[str, tuple[str, int]] = {}
        requests: list[Request | PoolingRequest] = []
        for row_id, (key, cell) in rows:
            stage = "sampling_params"
            try:
                # Users' own values are in it, whose classes this process may not be able to make.
                row: RowRequest = unpack(cell)
                assert row.prompt_token_ids is not None, "rows that failed before are not dispatched"
                if row.pooling_params is not None:
                    stage = "pooling_params"
                    asked[str(row_id)] = (json.dumps(row.pooling_params, sort_keys=True), len(row.prompt_token_ids))
                    requests.append(_pooling_request(row_id, row.prompt_token_ids, row))
                    continue
                params = self._params(row.sampling_params)
                stage = "lora"
                adapter = None if row.lora_request is None else on_this_node(row.lora_request, row.lora_root)
            except Exception as error:
                failed = RowOutput(None, "", row_id, 0.0, describe_failure(error, stage))
                self._put(_FinishedRow(row_id, failed, 0, 0))
                continue
            request = Request(
                request_id=str(row_id),
                prompt_token_ids=row.prompt_token_ids,
                sampling_params=params.value,
                key=_noise_key(key, params.value, row),
                lora_request=adapter,
                prompt_embeds=row.prompt_embeds,
            )
            asked[request.request_id] = (params.text, len(row.prompt_token_ids))
            requests.append(request)

        def deliver(output: AnyOutput) -> None:
            params, num_prompt = asked.pop(output.request_id)
            self._put(_finished_row(params, num_prompt, output, time.perf_counter() - started))

        if self._engine.death is None:
            self._engine.submit(requests, deliver)

    @masked_errors()
    def collect(self, timeout: float) -> Collected:
        """Rows that finished, as soon as there are some; none after `timeout` seconds."""
        with self._arrival:
            if not self._finished and self._engine.death is None:
                self._arrival.wait(timeout)
        if self._finished:
            time.sleep(_GATHER_SECONDS)
        with self._arrival:
            finished, self._finished = self._finished, []
        if finished:
            num_prompt = sum(row.num_prompt for row in finished)
            self._sampler.count(len(finished), num_prompt, sum(row.num_tokens for row in finished))
        outcomes = [Outcome(row.row_id, pack(row.output), row.output.error, row.num_tokens) for row in finished]
        death = self._engine.death
        return Collected(
            outcomes, self._engine.seconds_silent, None if death is None else redact(f"{type(death).__name__}: {death}")
        )

    def _put(self, row: _FinishedRow) -> None:
        with self._arrival:
            self._finished.append(row)
            self._arrival.notify()

    def _params(self, given: Any) -> _Params:
        # Most rows ask alike, and this thread shares its interpreter with the engine's: 150 us a row without this.
        given_bytes = pack(given)
        known = self._known_params.get(given_bytes)
        if known is None:
            params = SamplingParams.from_mapping(given, self._default_sampling_params)
            known = _Params(params, json.dumps(params.to_mapping(), sort_keys=True))
            if len(self._known_params) >= _KNOWN_PARAMS:
                self._known_params.clear()
            self._known_params[given_bytes] = known
        return known


def _noise_key(key: int, params: SamplingParams, row: RowRequest) -> int:
    """The row's own key, or that of its seed, which LLM gives the same prompt too."""
    if params.seed is None or row.prompt_token_ids is None:
        return key
    return seeded_key(params.seed, row.prompt_token_ids, row.prompt_embeds)


def _pooling_request(row_id: int, prompt: TokenArray, row: RowRequest) -> PoolingRequest:
    return PoolingRequest(
        request_id=str(row_id),
        prompt_token_ids=prompt,
        pooling_params=PoolingParams.from_mapping(row.pooling_params),
        token_type_ids=row.token_type_ids,
    )


def _finished_row(params: str, num_prompt: int, output: AnyOutput, seconds: float) -> _FinishedRow:
    row_id = int(output.request_id)
    error = None if output.error is None else describe_failure(output.error, "engine")
    num_tokens = sum(len(one.token_ids) for one in output.outputs) if isinstance(output, RequestOutput) else 0
    if len(output.prompt_token_ids) == num_prompt:
        output = dataclasses.replace(output, prompt_token_ids=[])
    return _FinishedRow(
        row_id, RowOutput(None if error else output, params, row_id, seconds, error), num_prompt, num_tokens
    )
