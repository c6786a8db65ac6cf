"""An engine that is replaced when it dies, and the search for the request that killed it.

Owns the replacement: after a death the blocks that were in the engine run again one at a time, halved as long as the
engine dies of them, so that a single request which kills engines ends as that request's error and takes no other row
with it. Knows no rows. Invariant: while such a search runs, no other block enters the engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from raydata_llm.engine.request import Request, RequestOutput

logger = logging.getLogger(__name__)


class RunningEngine(Protocol):
    """An engine in a thread of its own, as `raydata_llm.engine.engine_thread.EngineThread`."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run requests beside those of other callers."""
        ...

    def shutdown(self) -> None:
        """Free the device."""
        ...


StartEngine = Callable[[], tuple[RunningEngine, Mapping[str, Any]]]


class EngineLostError(RuntimeError):
    """The engine died and a new one does not start in this process."""


class GuardedEngine:
    """Serves `generate` calls from any thread, through deaths of the engine.

    Args:
        start: Makes an engine and tells the model's default sampling parameters.
    """

    def __init__(self, start: StartEngine) -> None:
        self._start = start
        self._engine, self.default_sampling_params = start()
        self._dead = False
        self._gate = threading.Condition()
        self._num_suspects = 0
        self._alone = threading.Lock()

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run the requests; one that kills the engine comes back with its `error` set.

        Raises:
            EngineLostError: when a dead engine cannot be replaced.
        """
        with self._gate:
            self._gate.wait_for(lambda: self._num_suspects == 0)
        outputs = self._attempt(requests)
        if outputs is None:
            with self._suspicion(), self._alone:
                outputs = self._generate_alone(requests)
        return outputs

    def stats(self) -> object | None:
        """The running engine's stats; None from one that tells none."""
        read = getattr(self._engine, "stats", None)
        return None if read is None else read()

    def shutdown(self) -> None:
        """Free the device."""
        self._engine.shutdown()

    @contextmanager
    def _suspicion(self) -> Iterator[None]:
        with self._gate:
            self._num_suspects += 1
        try:
            yield
        finally:
            with self._gate:
                self._num_suspects -= 1
                self._gate.notify_all()

    def _attempt(self, requests: Sequence[Request]) -> list[RequestOutput] | None:
        """The outputs, or None if the engine died of these requests or of others."""
        engine = self._engine
        try:
            return engine.generate(requests)
        except Exception as error:
            if not _is_engine_death(error):
                raise
            self._note_death(engine, error)
            return None

    def _note_death(self, engine: RunningEngine, error: Exception) -> None:
        with self._gate:
            if engine is self._engine and not self._dead:
                self._dead = True
                self._death = f"{type(error).__name__}: {error}"
                logger.error("The engine died and is replaced", exc_info=error)

    def _generate_alone(self, requests: Sequence[Request]) -> list[RequestOutput]:
        self._replace_dead()
        outputs = self._attempt(requests)
        if outputs is not None:
            return outputs
        if len(requests) == 1:
            request = requests[0]
            logger.error("Request %s kills the engine", request.request_id)
            return [RequestOutput(request.request_id, list(map(int, request.prompt_token_ids)), error=self._death)]
        half = len(requests) // 2
        return [*self._generate_alone(requests[:half]), *self._generate_alone(requests[half:])]

    def _replace_dead(self) -> None:
        if not self._dead:
            return
        try:
            self._engine.shutdown()
            self._engine, self.default_sampling_params = self._start()
        except Exception as error:
            raise EngineLostError(f"a new engine does not start: {type(error).__name__}: {error}") from error
        self._dead = False


def _is_engine_death(error: Exception) -> bool:
    from raydata_llm.engine.engine_thread import EngineDeadError

    return isinstance(error, EngineDeadError)
