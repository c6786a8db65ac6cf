"""From replicas and tasks to the actor that gathers one run's statistics: sent and forgotten.

Owns the actor's life and the senders. The actor has no name: a `JobLink` stands in the arguments of our operators, and
wherever Ray Data's pickles of them arrive, it is a `StatsSender` to the actor of the run that made the pickle. It takes
no CPU, sits on the driver's node, outlives every replica and is killed when the run ends (or dies with its driver).
Invariant: nobody waits for it. A sender whose actor is gone or busy drops what it was told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from raydata_llm.job_metrics import JobMetrics
from raydata_llm.job_stats import ErrorKind, JobStats, Progress, Snapshot, seconds_since
from raydata_llm.redaction import hide_environment, masked_logger
from raydata_llm.replica_sample import ReplicaSample

logger = masked_logger(__name__)

# Calls under way to one actor from one process; more are dropped.
_MAX_PENDING_CALLS = 200


class StatsActor:
    """`JobStats` in a process of its own, its figures exported to Prometheus.

    Args:
        job_id: Of the metrics' `job` tag.
        started_at: The run's begin, as of `time.time()`.
        with_metrics: Whether to export.
    """

    def __init__(self, job_id: str, started_at: float, with_metrics: bool) -> None:
        self._stats = JobStats(seconds_since(started_at))
        self._metrics = JobMetrics(job_id) if with_metrics else None

    def push(self, sample: ReplicaSample) -> None:
        """Take a replica's sample."""
        self._stats.push(sample)
        if self._metrics is not None:
            self._metrics.show_replica(sample)

    def count_block(self, block: tuple[int, int], num_rows: int, errors: Mapping[str, ErrorKind]) -> None:
        """Take the last operator's word for a block."""
        self._stats.count_block(block, num_rows, errors)

    def skip_rows(self, block: tuple[int, int], num_rows: int) -> None:
        """Take the first operator's word for rows that an earlier run had written."""
        self._stats.skip_rows(block, num_rows)

    def progress(self, total_rows: int | None) -> Progress:
        """The run now."""
        progress = self._stats.progress(total_rows)
        if self._metrics is not None:
            self._metrics.show_job(progress, self._stats.errors)
        return progress

    def snapshot(self) -> Snapshot:
        """All that a report is made of."""
        return self._stats.snapshot()


class StatsSender:
    """The end that replicas and tasks hold.

    Args:
        actor: A `StatsActor`'s handle; None sends nothing.
        interval: Seconds between two samples of a replica.
    """

    def __init__(self, actor: Any = None, interval: float = 0.25) -> None:
        self._actor = actor
        self.interval = interval

    @property
    def connected(self) -> bool:
        """Whether anybody listens."""
        return self._actor is not None

    def push(self, sample: ReplicaSample) -> None:
        """Send a replica's sample."""
        self._send("push", sample)

    def count_block(self, block: tuple[int, int], num_rows: int, errors: Mapping[str, ErrorKind]) -> None:
        """Send the last operator's word for a block."""
        self._send("count_block", block, num_rows, errors)

    def skip_rows(self, block: tuple[int, int], num_rows: int) -> None:
        """Send the first operator's word for rows that an earlier run had written."""
        self._send("skip_rows", block, num_rows)

    def _send(self, method: str, *arguments: Any) -> None:
        if self._actor is None:
            return
        try:
            getattr(self._actor, method).options(num_returns=0).remote(*arguments)
        except Exception as error:  # watching a job must never stop it
            if type(error).__name__ != "PendingCallsLimitExceeded":
                logger.warning("No statistics from this process any more: %s", error)
                self._actor = None


class JobLink:
    """The driver's end; pickled, it becomes a `StatsSender` to the present run's actor.

    Args:
        job_id: Of the metrics' `job` tag.
        with_metrics: Whether the actor exports to Prometheus.
        interval: Seconds between two samples of a replica.
        runtime_env: Of the actor.
    """

    def __init__(
        self, job_id: str, *, with_metrics: bool, interval: float, runtime_env: Mapping[str, Any] | None
    ) -> None:
        self._job_id = job_id
        self._with_metrics = with_metrics
        self._interval = interval
        self._runtime_env = runtime_env
        self._lock = threading.Lock()
        self._connected: Callable[[Any], None] | None = None
        self._started_at = 0.0
        self._actor: Any = None

    def open(self, started_at: float, connected: Callable[[Any], None]) -> None:
        """Begin a run: its actor is made when the first operator's arguments are pickled, if ever.

        Args:
            started_at: The run's begin, as of `time.time()`.
            connected: Told the actor's handle then.
        """
        with self._lock:
            self._started_at, self._connected, self._actor = started_at, connected, None

    def __reduce__(self) -> tuple[type[StatsSender], tuple[Any, float]]:
        with self._lock:
            if self._actor is None and self._connected is not None:
                self._actor = self._start_actor()
                self._connected(self._actor)
            return StatsSender, (self._actor, self._interval)

    def __deepcopy__(self, memo: object) -> JobLink:
        return self

    def _start_actor(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node_id = ray.get_runtime_context().get_node_id()
        options: dict[str, Any] = {"runtime_env": hide_environment(self._runtime_env)} if self._runtime_env else {}
        actor = ray.remote(StatsActor).options(
            num_cpus=0,
            max_restarts=0,
            max_pending_calls=_MAX_PENDING_CALLS,
            # Softly, a node that has just joined and knows no other yet would keep it.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            **options,
        )
        return actor.remote(self._job_id, self._started_at, self._with_metrics)
