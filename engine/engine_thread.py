"""An engine in a thread of its own, fed by many callers at once.

Owns that thread and the hand-over: requests go in at any time and each output is delivered as soon as it is there, so
no request waits for another's. A request that the engine refuses is a result with an error; an exception in the loop
ends the engine, which `death` tells. Importing it does not import torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from raydata_llm.engine.garbage_pause import GarbagePause
from raydata_llm.engine.pooling_request import PoolingOutput, PoolingRequest, PoolingRequestOutput
from raydata_llm.engine.request import Request, RequestOutput

if TYPE_CHECKING:
    from raydata_llm.engine.engine_stats import EngineStats

AnyRequest = Request | PoolingRequest
AnyOutput = RequestOutput | PoolingRequestOutput[PoolingOutput]
# The outputs are of the kind that the requests ask for.
Deliver = Callable[[Any], None]


class EngineDeadError(RuntimeError):
    """The engine's loop ended with an exception (its `__cause__`); a new engine is needed."""


class DrivenEngine(Protocol):
    """An engine that one thread drives: `Engine`, or `PoolingEngine` with requests of its own kind."""

    max_num_seqs: int

    def add_request(self, request: Any) -> None:
        """Queue a request."""
        ...

    def num_wanted(self) -> int:
        """Requests that it would take before the next step."""
        ...

    def step(self) -> Sequence[AnyOutput]:
        """Do some work; returns finished requests."""
        ...

    def stats(self) -> EngineStats:
        """Counts."""
        ...

    def shutdown(self) -> None:
        """Free the device."""
        ...


class EngineThread:
    """Takes requests from any thread.

    Args:
        engine: Driven by this object alone from now on.
    """

    def __init__(self, engine: DrivenEngine) -> None:
        self._engine = engine
        self.max_num_seqs = engine.max_num_seqs
        self._wake = threading.Condition()
        self._inbox: deque[tuple[AnyRequest, Deliver]] = deque()
        self._running: dict[str, tuple[AnyRequest, Deliver]] = {}
        self._ids = itertools.count()
        self._stopping = False
        self._death: BaseException | None = None
        self._last_sign = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[AnyRequest], deliver: Deliver) -> None:
        """Run the requests beside all others in the engine.

        Args:
            requests: Their ids need to be unique to nobody: the outputs carry the caller's.
            deliver: Called in the engine's thread with each output as it finishes; it must not block.

        Raises:
            EngineDeadError: if the engine died, or was shut down.
        """
        with self._wake:
            self._check_alive()
            self._inbox.extend((request, deliver) for request in requests)
            self._wake.notify()

    @property
    def death(self) -> BaseException | None:
        """What ended the loop; requests that were under way are delivered no output then."""
        return self._death

    @property
    def seconds_silent(self) -> float:
        """How long the loop, with something to do, has neither ended a step nor taken in a request."""
        return time.monotonic() - self._last_sign if self._running or self._inbox else 0.0

    def stats(self) -> EngineStats:
        """The engine's counts (read while it runs: each number is right, together they may be a step apart)."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """End the thread and free the device; requests under way are dropped."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _check_alive(self) -> None:
        if self._death is not None:
            reason = f"{type(self._death).__name__}: {self._death}"
            raise EngineDeadError(f"the engine died of {reason}") from self._death
        if self._stopping:
            raise EngineDeadError("the engine was shut down")

    def _run(self) -> None:
        try:
            with GarbagePause() as garbage:
                while self._take_requests():
                    for output in self._engine.step():
                        self._deliver(output)
                    garbage.collect_if_due()
                    self._last_sign = time.monotonic()
        except BaseException as error:
            self._death = error
        finally:
            self._stopping = True
            self._engine.shutdown()

    def _take_requests(self) -> bool:
        """Move new requests into the engine, waiting for some if it has none; False when it is time to stop."""
        with self._wake:
            while not self._inbox and not self._running and not self._stopping:
                self._wake.wait()
                self._last_sign = time.monotonic()
            wanted = self._engine.num_wanted()
            arrived = [self._inbox.popleft() for _ in range(min(wanted, len(self._inbox)))]
        for request, deliver in arrived:
            self._add(request, deliver)
            self._last_sign = time.monotonic()
        return not self._stopping

    def _add(self, request: AnyRequest, deliver: Deliver) -> None:
        engine_id = str(next(self._ids))
        self._running[engine_id] = (request, deliver)
        try:
            self._engine.add_request(dataclasses.replace(request, request_id=engine_id))
        except Exception as error:
            # Whatever a request's values make of the checks (an adapter's path, say, that no system takes): the engine
            # is as it was before, and the others go on.
            del self._running[engine_id]
            deliver(request.refused(f"{type(error).__name__}: {error}"))

    def _deliver(self, output: AnyOutput) -> None:
        request, deliver = self._running.pop(output.request_id)
        output.request_id = request.request_id
        deliver(output)
