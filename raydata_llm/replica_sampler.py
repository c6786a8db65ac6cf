"""A replica's own observer: a thread that samples its engine a few times a second and sends what it sees.

Owns that thread, the replica's counts of rows, and the phases of its start. It reads the engine's stats from outside:
the engine's loop never waits for it. Knows no Ray Data. Invariant: nothing here raises into the replica's work.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raydata_llm.engine.phases import PHASE_LOGGER
from raydata_llm.job_link import StatsSender
from raydata_llm.job_stats import RUNNING
from raydata_llm.redaction import masked_logger
from raydata_llm.replica_sample import EngineFigures, ReplicaSample, SteadyCounts

logger = masked_logger(__name__)


class ReplicaSampler:
    """Watches one replica.

    Args:
        sender: To whom its samples go.
    """

    def __init__(self, sender: StatsSender) -> None:
        self._sender = sender
        self._read_stats: Callable[[], object | None] = lambda: None
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:4]}"
        self._phase = "starting"
        self._counts = SteadyCounts()
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._rows_held = self._rows_done = self._prompt_tokens = self._output_tokens = 0
        self._stop = threading.Event()
        if sender.connected:
            # The thread holds no strong reference: a replica that is dropped ends it.
            thread = threading.Thread(target=_sample_often, args=(weakref.ref(self), self._stop), daemon=True)
            thread.name = "replica-sampler"
            thread.start()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While the engine starts: what it announces (`engine.phases`) is this replica's phase."""
        listener = _PhaseListener(self._enter)
        channel = logging.getLogger(PHASE_LOGGER)
        channel.setLevel(logging.INFO)
        channel.addHandler(listener)
        try:
            yield
        finally:
            channel.removeHandler(listener)

    def watch(self, read_stats: Callable[[], object | None]) -> None:
        """The engine runs.

        Args:
            read_stats: Its stats, or None from one that tells none.
        """
        self._read_stats = read_stats
        self._enter(RUNNING)

    def hold(self, num_rows: int) -> None:
        """Rows came in."""
        with self._lock:
            self._rows_held += num_rows

    def count(self, num_rows: int, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Rows are through."""
        with self._lock:
            self._rows_held -= num_rows
            self._rows_done += num_rows
            self._prompt_tokens += num_prompt_tokens
            self._output_tokens += num_output_tokens
            last = self._rows_held == 0
        if last:  # these may have been the job's last rows
            self.send()

    def send(self) -> None:
        """Send a sample now."""
        if self._sender.connected:
            with self._sending:  # samples of several threads arrive in the order in which they were taken
                self._sender.push(self._sample())

    def close(self) -> None:
        """End the thread."""
        self._stop.set()

    def __del__(self) -> None:
        self._stop.set()

    @property
    def interval(self) -> float:
        """Seconds between two samples."""
        return self._sender.interval

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self.send()

    def _sample(self) -> ReplicaSample:
        stats = self._read_stats() if self._phase == RUNNING else None
        with self._lock:
            figures = None if stats is None else self._counts.continued(EngineFigures.of(stats))
            return ReplicaSample(
                replica=self._name,
                node=socket.gethostname(),
                phase=self._phase,
                running=self._phase == RUNNING,
                rows_held=self._rows_held,
                rows_done=self._rows_done,
                prompt_tokens=self._prompt_tokens,
                output_tokens=self._output_tokens,
                figures=figures,
            )


def _sample_often(reference: weakref.ref[ReplicaSampler], stop: threading.Event) -> None:
    while True:
        sampler = reference()
        if sampler is None:
            return
        try:
            sampler.send()
        except Exception:
            logger.exception("This replica is not watched any more")
            return
        interval = sampler.interval
        del sampler
        if stop.wait(interval):
            return


class _PhaseListener(logging.Handler):
    """Hands announced phases on."""

    def __init__(self, enter: Callable[[str], None]) -> None:
        super().__init__()
        self._enter = enter

    def emit(self, record: logging.LogRecord) -> None:
        self._enter(record.getMessage())
