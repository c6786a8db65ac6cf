"""Engines that die, hang or take their process with them, and draw how long they take and what they say afresh.

A row that ran twice says another number each time, and blocks differ between two attempts, so that a row which is lost,
repeated or mixed up shows.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from ray import cloudpickle

from raydata_llm import EngineProcessorConfig
from raydata_llm.engine.engine_thread import EngineThread
from raydata_llm.engine.request import CompletionOutput, Request, RequestOutput
from raydata_llm.processor import Processor
from raydata_llm.replica import EngineFactory, RunningEngine

# The replicas do not have the tests' folder on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

POISON = 13
SLOTS = 16


class FaultyEngine:
    """Answers a row with its own number, drawn time and drawn length.

    Args:
        fault: "" for none; "die", "hang" or "kill", once, when it has done some rows; "poison" and "kill by poison" on
            each row with max_tokens=13.
        mark: A file that the first engine with a fault makes.
    """

    max_num_seqs = SLOTS

    def __init__(self, fault: str, mark: Path) -> None:
        self._fault, self._mark = fault, mark
        self._draw = random.SystemRandom()
        self._waiting: list[Request] = []
        self._running: list[tuple[float, Request]] = []
        self._num_done = 0

    def add_request(self, request: Request) -> None:
        self._waiting.append(request)

    def num_wanted(self) -> int:
        return 256

    def step(self) -> list[RequestOutput]:
        time.sleep(0.005)
        while self._waiting and len(self._running) < SLOTS:
            self._running.append((time.monotonic() + self._draw.uniform(0.01, 0.15), self._waiting.pop()))
        self._fail()
        now = time.monotonic()
        done = [request for end, request in self._running if end <= now]
        self._running = [entry for entry in self._running if entry[0] > now]
        self._num_done += len(done)
        return [self._answer(request) for request in done]

    def stats(self) -> Any:
        return None

    def shutdown(self) -> None:
        pass

    def _fail(self) -> None:
        poisoned = any(request.sampling_params.max_tokens == POISON for _, request in self._running)
        if poisoned and self._fault == "poison":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if poisoned and self._fault == "kill by poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault in ("die", "hang", "kill") and self._num_done >= 2 * SLOTS and self._is_first():
            if self._fault == "die":
                raise RuntimeError("CUDA error: unspecified launch failure")
            if self._fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)

    def _is_first(self) -> bool:
        try:
            self._mark.touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    def _answer(self, request: Request) -> RequestOutput:
        prompt = np.asarray(request.prompt_token_ids).tolist()
        tokens = [self._draw.randrange(3, 200) for _ in range(self._draw.randrange(1, 400))]
        output = CompletionOutput(0, tokens, "length", f"{sum(prompt)} {self._draw.random()}")
        return RequestOutput(request.request_id, prompt, [output])


def start_faulty_engine(fault: str, folder: Path) -> EngineFactory:
    """A factory of such engines."""

    def start(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        engine: Any = FaultyEngine(fault, folder / "fault")
        return cast(RunningEngine, EngineThread(engine)), {}

    return start


def faulty_processor(model: str, fault: str, folder: Path, poisoned: tuple[int, ...] = (), **fields: Any) -> Processor:
    """A processor over rows with an `id`, of which some are poison."""

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        max_tokens = POISON if row["id"] in poisoned else 500
        return {"prompt": f"row {row['id']}", "sampling_params": {"max_tokens": max_tokens}}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        said, draw = row["stop_reason"].split()
        assert int(said) == sum(row["prompt_token_ids"]), "the answer to another row"
        return {"id": row["id"], "draw": float(draw), "tokens": row["generated_tokens"]}

    settings = {"should_continue_on_error": True, "batch_size": 32, **fields}
    config = EngineProcessorConfig(model_source=model, **settings)
    return Processor(config, ask, answer, engine_factory=start_faulty_engine(fault, folder))


def check_rows(rows: list[dict[str, Any]], count: int, failed: tuple[int, ...] = ()) -> None:
    """Every row exactly once, each with an answer of its own, none failed but these."""
    assert Counter(row["id"] for row in rows) == Counter(range(count))
    errors = {row["id"]: row["__inference_error__"] for row in rows if row["__inference_error__"]}
    assert set(errors) == set(failed), errors
    draws = Counter(row["draw"] for row in rows if row["id"] not in failed)
    assert set(draws.values()) == {1}, "an answer that two rows have"


def pids_of_replicas() -> list[int]:
    """Processes of the replicas that live."""
    from ray._private.state import actors

    known = actors().values()
    return [actor["Pid"] for actor in known if actor["ActorClassName"] == "Replica" and actor["State"] == "ALIVE"]


def pid_of_dispatcher() -> int:
    """Process of the dispatcher that serves."""
    from ray._private.state import actors

    (pid,) = (
        actor["Pid"]
        for actor in actors().values()
        if "Dispatcher" in actor["ActorClassName"] and actor["State"] == "ALIVE"
    )
    return int(pid)


def nodes_of_replicas() -> set[str]:
    """Nodes of the replicas that live."""
    from ray._private.state import actors

    known = actors().values()
    live = [actor for actor in known if actor["ActorClassName"] == "Replica" and actor["State"] == "ALIVE"]
    return {actor["Address"]["NodeID"] for actor in live}


def live_actors() -> list[str]:
    """Classes of all actors that live, Ray Data's own services left out."""
    from ray._private.state import actors

    own = ("Replica", "StatsActor", "ResumeBroker", "MapWorker")
    known = actors().values()
    return [
        actor["ActorClassName"]
        for actor in known
        if actor["State"] != "DEAD" and actor["ActorClassName"].startswith(own)
    ]


def with_ids(count: int, blocks: int) -> ray.data.Dataset:
    """A dataset of rows that are numbered."""
    return ray.data.range(count, override_num_blocks=blocks)
