"""An engine that only takes time: so many slots, so long a token, as many tokens as a row may write.

It stands under the real `EngineThread` and the real replica, dispatcher and processor, and admits costly rows first, as
the real scheduler does.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from ray import cloudpickle

from raydata_llm.engine.engine_thread import EngineThread
from raydata_llm.engine.request import CompletionOutput, Request, RequestOutput
from raydata_llm.replica import EngineFactory, RunningEngine

# The replicas do not have the tests' folder on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

_TOKEN = 65


@dataclass(frozen=True, kw_only=True)
class SlotEngineSettings:
    """How a `SlotEngine` behaves.

    Args:
        max_num_seqs: Slots.
        token_seconds: Time of a step, in which each row writes a token; 0 answers at once.
        random_lengths: Draw each row's length anew, up to its max_tokens, in every process.
        start_seconds: Time that an engine takes to start, as loading weights does.
        log: A folder for a file a process with [time, running, started] a line.
    """

    max_num_seqs: int = 256
    token_seconds: float = 0.02
    random_lengths: bool = False
    start_seconds: float = 0.0
    log: Path | None = None


class SlotEngine:
    """Takes the place of `raydata_llm.engine.engine.Engine`."""

    def __init__(self, settings: SlotEngineSettings) -> None:
        self.max_num_seqs = settings.max_num_seqs
        self._settings = settings
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, Request, int]] = []
        # (step at which the row ends, order, request, tokens)
        self._running: list[tuple[int, int, Request, int]] = []
        self._num_steps = self._num_started = 0
        self._next_step = 0.0
        self._random = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
        self._log = None if settings.log is None else open(settings.log / f"{os.getpid()}.jsonl", "a")  # noqa: SIM115
        self._note()

    def add_request(self, request: Request) -> None:
        longest = request.sampling_params.max_tokens or 16
        length = int(self._random.integers(1, longest + 1)) if self._settings.random_lengths else longest
        heapq.heappush(self._waiting, (-longest, next(self._order), request, length))

    def num_wanted(self) -> int:
        return 256

    def step(self) -> list[RequestOutput]:
        self._admit()
        self._note()
        if self._settings.token_seconds:
            # On the beat, so that what this machine's two cores do beside it does not slow the fake device down.
            now = time.monotonic()
            self._next_step = max(self._next_step + self._settings.token_seconds, now)
            time.sleep(self._next_step - now)
            self._num_steps += 1
        finished = []
        while self._running and (self._running[0][0] <= self._num_steps or not self._settings.token_seconds):
            _, _, request, length = heapq.heappop(self._running)
            prompt = [int(token_id) for token_id in request.prompt_token_ids]
            choices = [CompletionOutput(n, [_TOKEN] * length, "length") for n in range(request.sampling_params.n)]
            finished.append(RequestOutput(request.request_id, prompt, choices))
        return finished

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(num_running=len(self._running), num_waiting=len(self._waiting))

    def shutdown(self) -> None:
        if self._log is not None:
            self._log.close()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_num_seqs:
            _, order, request, length = heapq.heappop(self._waiting)
            self._num_started += 1
            heapq.heappush(self._running, (self._num_steps + length, order, request, length))

    def _note(self) -> None:
        if self._log is not None:
            print(json.dumps([time.time(), len(self._running), self._num_started]), file=self._log, flush=True)


def start_slot_engine(settings: SlotEngineSettings, ranks: Path | None = None, **of_rank: Any) -> EngineFactory:
    """A factory of such engines.

    Args:
        settings: Of all engines.
        ranks: A folder in which the engines draw their ranks, 0 and up, for:
        of_rank: `late={rank: seconds}` to start, `slow={rank: factor}` of a token's time.
    """

    def start(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        import dataclasses

        rank = _draw_rank(ranks) if ranks is not None else 0
        time.sleep(settings.start_seconds + of_rank.get("late", {}).get(rank, 0.0))
        factor = of_rank.get("slow", {}).get(rank, 1.0)
        engine: Any = SlotEngine(dataclasses.replace(settings, token_seconds=settings.token_seconds * factor))
        return cast(RunningEngine, EngineThread(engine)), {}

    return start


def _draw_rank(folder: Path) -> int:
    for rank in itertools.count():
        try:
            (folder / str(rank)).touch(exist_ok=False)
            return rank
        except FileExistsError:
            continue
    raise AssertionError("count() has no end")
