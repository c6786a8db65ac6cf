"""A processor's job on the driver: each execution of its dataset is a run, watched and reported.

Owns when a run begins and ends. A lazy Dataset does not tell, Ray Data's executor does: the job is put into the
dataset's own copy of its DataContext as an execution callback, so whatever consumes the dataset (a writer, `take`,
`materialize`, an iterator that is dropped half way) begins a run and ends it. A run in which our operators have no part
(a child of a materialised dataset) starts no actor and leaves no report. Invariant: nothing here stops or slows the
job; what fails while watching is logged.
"""

from __future__ import annotations

import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.data import Dataset
from ray.experimental.tqdm_ray import safe_print

from raydata_llm import __version__, ray_loop
from raydata_llm.config import EngineProcessorConfig
from raydata_llm.job_link import JobLink
from raydata_llm.job_progress import progress_line, stop_line
from raydata_llm.job_report import JobReport, JobSettings
from raydata_llm.job_stats import Progress, Snapshot
from raydata_llm.ray_operators import claim_priority, dispatchers, starting
from raydata_llm.redaction import masked_logger, secret_values
from raydata_llm.replica_pool import ReplicaPool
from raydata_llm.row_payload import RowError

logger = masked_logger(__name__)

_POLL_SECONDS = 1.0
# A snapshot now and then, for the report of a job whose statistics are lost before its end.
_SNAPSHOT_SECONDS = 15.0
_ANSWER_SECONDS = 5.0
# How long a report waits for the last counts, which are on their way from other processes.
_SETTLE_SECONDS = 0.5
_LINE_SECONDS_ON_TERMINAL, _LINE_SECONDS_IN_LOG, _LINE_SECONDS_AT_START = 5.0, 30.0, 10.0


class Job:
    """One dataset through a processor. Ray Data calls it for a callback of each execution.

    Args:
        settings: What a report says of the job.
        pool_size: Replicas that are expected at least.
        interval: Seconds between two samples of a replica.
        with_metrics: Whether to export Prometheus metrics.
        report_folder: Where each run's report is written; None writes none.
        runtime_env: Of the statistics actor.

    A sink of ours sets `rows_written`, which says how many rows it has committed.
    """

    def __init__(
        self,
        settings: JobSettings,
        *,
        pool_size: int,
        interval: float = 0.25,
        with_metrics: bool = True,
        report_folder: str | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.pool_size = pool_size
        self.report_folder = report_folder
        self.job_id = uuid.uuid4().hex[:8]
        self.link = JobLink(self.job_id, with_metrics=with_metrics, interval=interval, runtime_env=runtime_env)
        self.rows_written: Callable[[], int] | None = None
        self._run: JobRun | None = None

    @classmethod
    def of(cls, config: EngineProcessorConfig, pool: ReplicaPool) -> Job:
        """The job of a processor on a pool."""
        # Of the workers, beside the driver's own: they mask what they write, and Ray writes about them here.
        environments = (config.runtime_env, ray.get_runtime_context().runtime_env)
        secrets = [value for one in environments for value in secret_values((one or {}).get("env_vars") or {})]
        shown = {
            "model": config.model_source,
            "engine_kwargs": dict(pool.engine_kwargs),
            "replicas": config.concurrency,
            "device": "GPU" if pool.use_gpu else "CPU",
            "rows of a block": pool.block_rows,
            "blocks at once": pool.blocks_in_flight,
            "should_continue_on_error": config.should_continue_on_error,
            "versions": f"raydata_llm {__version__}, Ray {ray.__version__}, Python {platform.python_version()}",
        }
        return cls(
            JobSettings(model=config.model_source, shown=shown, secrets=secrets),
            pool_size=pool.min_size,
            # Sixty-four samples a second in all are enough for any chart.
            interval=max(0.25, pool.max_size / 64),
            with_metrics=config.log_engine_metrics,
            report_folder=config.report_path,
            runtime_env=config.runtime_env,
        )

    def __call__(self) -> JobRun:
        run = JobRun(self)
        self.link.open(run.started_at, run.connect)
        return run

    def __deepcopy__(self, memo: object) -> Job:
        return self

    def __repr__(self) -> str:
        return f"Job({self.job_id})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        # The DataContext travels to every task; nobody plans an execution there.
        return _no_job, ()

    def watch(self, dataset: Dataset) -> Dataset:
        """The dataset, with this job told of each of its executions; the user's DataContext stays as it is."""
        watched: Dataset = Dataset.copy(dataset, _deep_copy=True)
        callbacks: list[Any] | None = getattr(watched.context, "custom_execution_callback_classes", None)
        if callbacks is None:
            logger.warning("This version of Ray Data has no execution callbacks: no progress line and no report")
            return dataset
        callbacks.append(self)
        return watched

    def begin(self, run: JobRun) -> None:
        """Make a run the latest: our operators have a part in it."""
        self._run = run

    def tell_stopped(self) -> None:
        """Say what a sink had written when the job was stopped early."""
        if self._run is not None and self.rows_written is not None:
            self._run.tell_stopped(self.rows_written())

    def report(self) -> JobReport:
        """The latest run's report; of a run under way, so far.

        Raises:
            ValueError: when nothing has run yet.
        """
        if self._run is None:
            raise ValueError("there is no report yet: nothing has run; consume the dataset first (write, take, ...)")
        return self._run.report()


def jobs_of(dataset: Dataset) -> list[Job]:
    """The jobs of a dataset that came out of processors, in their order."""
    callbacks = getattr(dataset.context, "custom_execution_callback_classes", [])
    return [callback for callback in callbacks if isinstance(callback, Job)]


def report_of(dataset: Dataset) -> JobReport:
    """The report of the latest run of a dataset that came out of a processor.

    Raises:
        ValueError: for a dataset of another kind, or one that has not run yet.
    """
    jobs = jobs_of(dataset)
    if not jobs:
        raise ValueError("there is no report of this dataset: give one that came out of a processor")
    return jobs[-1].report()


class JobRun:
    """One execution of a job's dataset, as Ray Data's callback (its `ExecutionCallback`, by shape).

    Args:
        job: Whose.
    """

    def __init__(self, job: Job) -> None:
        self.started_at = time.time()
        self._job = job
        self._actor: Any = None
        self._total_rows: int | None = None
        self._snapshot: Snapshot | None = None
        self._report: JobReport | None = None
        self._lost: str | None = None
        self._shown = False
        self._stop = threading.Event()
        self._looked_at = 0.0
        self._dispatchers: list[Any] = []
        self._lost_at: float | None = None
        self._rows_answered = 0
        self._looks_often = False

    def connect(self, actor: Any) -> None:
        """Take the statistics actor: our operators are about to start."""
        self._actor = actor
        self._job.begin(self)

    def before_execution_starts(self, execution: Any) -> None:
        """Ray Data's word that the operators run."""
        if self._actor is None:
            return
        self._shown = bool(execution._data_context.enable_progress_bars)
        self._dispatchers = dispatchers(execution)
        ray_loop.begin_run()
        self._looks_often = True
        threading.Thread(target=self._watch, name="job-watch", daemon=True).start()

    def on_execution_step(self, execution: Any) -> None:
        """Ray Data's word, many times a second, from its scheduling loop."""
        now = time.monotonic()
        if self._actor is not None and now - self._looked_at > _POLL_SECONDS:
            self._looked_at = now
            self._total_rows = _rows_expected(execution)

    def after_execution_succeeds(self, execution: Any) -> None:
        """Ray Data's word that all rows are out, or that nobody wants the rest."""
        self._end("finished", None)

    def after_execution_fails(self, execution: Any, error: BaseException) -> None:
        """Ray Data's word that the job failed or was interrupted."""
        # Ray Data leaves actors to the garbage collector, and an error that a notebook or an `except` keeps holds them:
        # the replicas would keep their GPUs from the next job.
        if ray.is_initialized():
            for dispatcher in self._dispatchers:
                ray.kill(dispatcher)
        self._end("failed", error)

    def tell_stopped(self, rows_written: int) -> None:
        """Say how many rows are written, and how many were answered beside these."""
        answered = self._rows_answered if self._report is None else self._report.generated_rows
        self._show(stop_line(answered, rows_written))

    def report(self) -> JobReport:
        """The run's report, final or so far."""
        if self._report is not None:
            return self._report
        return self._make_report("running", self._ask("snapshot"), None)

    def _end(self, status: str, error: BaseException | None) -> None:
        self._dispatchers.clear()
        if self._looks_often:
            self._looks_often = False
            ray_loop.end_run()
        if self._actor is None or self._report is not None:
            return
        self._stop.set()
        try:
            self._report = self._make_report(status, self._last_snapshot(), error)
            self._kill_actor()
            self._show(str(self._report))
            if self._job.report_folder is not None:
                written = self._report.save(self._job.report_folder)
                self._show("raydata_llm  report: " + ", ".join(written))
        except Exception:  # the rows are out: a report is not worth a job
            logger.exception("The job's report could not be made")

    def _make_report(self, status: str, snapshot: Snapshot | None, error: BaseException | None) -> JobReport:
        return JobReport.of(
            self._job.settings,
            snapshot or self._snapshot,
            job_id=self._job.job_id,
            status=status,
            error=None if error is None else _cause(error),
            started_at=self.started_at,
            ended_at=time.time(),
            total_rows=self._total_rows,
            gap=self._lost,
        )

    def _last_snapshot(self) -> Snapshot | None:
        patience = time.monotonic() + _SETTLE_SECONDS
        snapshot: Snapshot | None = self._ask("snapshot")
        while snapshot is not None and time.monotonic() < patience:
            if snapshot.totals.rows_generated == snapshot.totals.rows_finished:
                break
            time.sleep(0.05)
            snapshot = self._ask("snapshot") or snapshot
        return snapshot

    def _watch(self) -> None:
        news = _News(_LINE_SECONDS_ON_TERMINAL if sys.stderr.isatty() else _LINE_SECONDS_IN_LOG)
        last_snapshot = time.monotonic()
        while not self._stop.wait(_POLL_SECONDS) and self._lost is None:
            restarting_s = self._watch_dispatchers()
            progress: Progress | None = self._ask("progress", self._total_rows)
            if progress is None:
                continue
            now = time.monotonic()
            self._rows_answered = progress.totals.rows_answered
            if news.worth_a_line(progress, now, is_restarting=restarting_s is not None):
                written = None if self._job.rows_written is None else self._job.rows_written()
                size = self._job.pool_size
                self._show(progress_line(progress, pool_size=size, restarting_s=restarting_s, rows_written=written))
            if now - last_snapshot > _SNAPSHOT_SECONDS:
                self._snapshot, last_snapshot = self._ask("snapshot") or self._snapshot, now

    def _watch_dispatchers(self) -> float | None:
        """For how many seconds a dispatcher that was lost has not been replaced; None if all serve."""
        if not ray.is_initialized():
            return None
        waiting = starting(self._dispatchers)
        for dispatcher in waiting:
            claim_priority(dispatcher)
        if not any(waiting.values()):
            self._lost_at = None
            return None
        self._lost_at = self._lost_at or time.monotonic()
        return time.monotonic() - self._lost_at

    def _ask(self, method: str, *arguments: Any) -> Any:
        """The actor's answer; None when it is lost or late."""
        # ray.get would start a new Ray once this one is gone.
        if self._actor is None or self._lost is not None or not ray.is_initialized():
            return None
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_SECONDS)
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError as error:
            self._lost = f"the statistics of this run were lost after {time.time() - self.started_at:.0f} s"
            logger.warning("%s (%s); the job goes on", self._lost, type(error).__name__)
            return None

    def _kill_actor(self) -> None:
        actor, self._actor = self._actor, None
        if ray.is_initialized():
            ray.kill(actor)

    def _show(self, text: str) -> None:
        if not self._shown:
            logger.info(text)
            return
        safe_print(text, file=sys.stderr)  # type: ignore[no-untyped-call]


class _News:
    """When a progress line is worth showing: once in a while, and when the start has come to something new.

    Args:
        every: Seconds between two lines once rows come out.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._shown_at = 0.0
        self._stage: object = None

    def worth_a_line(self, progress: Progress, now: float, *, is_restarting: bool) -> bool:
        """Whether to show it now; what is worth it counts as shown."""
        begun = progress.totals.rows_answered > 0
        stage = (is_restarting, begun or (tuple(progress.phases), progress.num_ready))
        # What a start does is news for people who wait.
        every = self._every if begun else min(self._every, _LINE_SECONDS_AT_START)
        if stage == self._stage and now - self._shown_at < every:
            return False
        self._shown_at, self._stage = now, stage
        return True


def _rows_expected(execution: Any) -> int | None:
    """Rows that go into our first operator, as far as Ray Data can tell by now."""
    ours = next((operator for operator in execution._topology if "(prepare)" in operator.name), None)
    if ours is None or not ours.input_dependencies:
        return None
    source = ours.input_dependencies[0]
    if source.name.startswith("StreamingRepartition") and source.input_dependencies:
        # Of its own repartition Ray Data guesses the rows by those of the tasks that are done: 500 of 1000.
        source = source.input_dependencies[0]
    total = source.num_output_rows_total()
    return None if total is None else max(int(total), int(source.metrics.row_outputs_taken))


def _no_job() -> Any:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return ExecutionCallback


def _cause(error: BaseException) -> str:
    """What a job failed of: what our operator says of the row, where Ray's error holds that, then the whole."""
    whole, ours = f"{type(error).__name__}: {error}", f"{RowError.__module__}.{RowError.__name__}: "
    row = next((line.removeprefix(ours) for line in whole.splitlines() if line.startswith(ours)), None)
    return whole if row is None else f"{row}\n{whole}"
