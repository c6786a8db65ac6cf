"""An engine in a thread of its own, fed by many callers at once.

Owns that thread and the hand-over: callers block until their requests are done, and the engine sees all of them
together, so one caller's slow rows never hold up another's. A request that the engine refuses is a result with an
error; an exception in the loop ends the engine, and every caller, present and later, is told.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from raydata_llm.engine.engine import Engine, EngineStats
from raydata_llm.engine.request import Request, RequestOutput


class EngineDeadError(RuntimeError):
    """The engine's loop ended with an exception (its `__cause__`); a new engine is needed."""


@dataclass(eq=False)
class _Call:
    """One caller's requests on their way."""

    results: list[RequestOutput | None]
    done: threading.Event = field(default_factory=threading.Event)
    num_missing: int = 0

    def put(self, index: int, output: RequestOutput) -> None:
        self.results[index] = output
        self.num_missing -= 1
        if self.num_missing == 0:
            self.done.set()


class EngineThread:
    """Serves `generate` calls from any thread.

    Args:
        engine: Driven by this object alone from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._inbox: deque[tuple[_Call, int, Request]] = deque()
        self._waiting_for: dict[str, tuple[_Call, int, Request]] = {}
        self._ids = itertools.count()
        self._stopping = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run the requests beside all others in the engine; returns their outputs in order.

        Request ids need to be unique to nobody: the outputs carry the caller's.

        Raises:
            EngineDeadError: if the engine died, or was shut down.
        """
        if not requests:
            return []
        call = _Call(results=[None] * len(requests), num_missing=len(requests))
        with self._wake:
            self._check_alive()
            self._inbox.extend((call, index, request) for index, request in enumerate(requests))
            self._wake.notify()
        call.done.wait()
        if any(result is None for result in call.results):
            self._check_alive()
        return [result for result in call.results if result is not None]

    def stats(self) -> EngineStats:
        """The engine's counts (read while it runs: each number is right, together they may be a step apart)."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """End the thread and free the device; calls under way get EngineDeadError."""
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
            while self._take_requests():
                for output in self._engine.step():
                    self._deliver(output)
        except BaseException as error:
            self._death = error
        finally:
            self._stopping = True
            self._release_callers()
            self._engine.shutdown()

    def _take_requests(self) -> bool:
        """Move new requests into the engine, waiting for some if it has none; False when it is time to stop."""
        with self._wake:
            while not self._inbox and not self._waiting_for and not self._stopping:
                self._wake.wait()
            arrived = list(self._inbox)
            self._inbox.clear()
        for entry in arrived:
            self._add(entry)
        return not self._stopping

    def _add(self, entry: tuple[_Call, int, Request]) -> None:
        call, index, request = entry
        engine_id = str(next(self._ids))
        self._waiting_for[engine_id] = entry
        try:
            self._engine.add_request(dataclasses.replace(request, request_id=engine_id))
        except ValueError as error:
            del self._waiting_for[engine_id]
            prompt = list(map(int, request.prompt_token_ids))
            call.put(index, RequestOutput(request.request_id, prompt, error=f"ValueError: {error}"))

    def _deliver(self, output: RequestOutput) -> None:
        call, index, request = self._waiting_for.pop(output.request_id)
        output.request_id = request.request_id
        call.put(index, output)

    def _release_callers(self) -> None:
        with self._wake:
            entries = [*self._waiting_for.values(), *self._inbox]
            self._waiting_for.clear()
            self._inbox.clear()
        for call, _, _ in entries:
            call.done.set()
