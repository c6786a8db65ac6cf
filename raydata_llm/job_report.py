"""What a job did, how fast and why not faster: as figures, as text, as JSON and as a page.

Owns what each figure means. Knows no Ray. Credentials are masked when the report is made, so nothing that is written
from it holds any. Times are seconds since the run began.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from raydata_llm.job_progress import count, duration, rate
from raydata_llm.job_stats import JOB, ErrorKind, ReplicaRecord, Snapshot, Totals
from raydata_llm.job_timeline import Timeline
from raydata_llm.redaction import redact, redact_tree
from raydata_llm.report_folder import write_texts

# Of all rows, the part that start and end do not touch.
_STEADY_FROM, _STEADY_TO = 0.1, 0.9
_EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How a job was asked for.

    Args:
        model: As the user named it.
        shown: Name to value, as the report lists them.
        secrets: Values to be masked, beside those of the driver's own environment.
    """

    model: str
    shown: Mapping[str, Any]
    secrets: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Steady:
    """The span in which rows 10 % to 90 % came out: neither start-up nor tail.

    Args:
        start, end: Of the span.
        rows_per_second, prompt_tokens_per_second, output_tokens_per_second: In it; None if it is too short to tell.
    """

    start: float
    end: float
    rows_per_second: float | None
    prompt_tokens_per_second: float | None
    output_tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class Levels:
    """One figure over time, across the replicas that told it: a value a bin, None where there is none."""

    mean: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class ReplicaReport:
    """One replica's process.

    Args:
        name: Host, process and a mark, so that a restarted one is another.
        phases: (start, what it did), the last phase up to its last sign of life.
        ready: When its engine first took rows; None if it never did.
        last_seen: Its last sign of life.
        rows, prompt_tokens, output_tokens: That came out of its engine.
        idle_share: Of the time since it was ready, the share without a step in flight: from the start of a step's
            launch to its tokens' arrival on the host counts as busy. None if the engine does not tell.
        starved_share: Of the same time, the part of `idle_share` in which the engine had no row at all; the rest is
            time between steps while rows were there.
        busy: 1 - idle share, a value a bin of the timeline.
    """

    name: str
    phases: Sequence[tuple[float, str]]
    ready: float | None
    last_seen: float
    rows: int
    prompt_tokens: int
    output_tokens: int
    idle_share: float | None
    starved_share: float | None
    busy: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class TimelineReport:
    """What happened when: bins of equal width from the run's begin.

    Args:
        bin_seconds: Width of a bin.
        rows: Rows that left the last operator in the bin.
        prompt_tokens_per_second, output_tokens_per_second: Computed and sampled by all engines, tokens of rows that
            were not done included. Prompt tokens that came from the prefix cache are not in it.
        batch_size: Sequences in an engine's batch.
        kv_usage: Share of an engine's KV blocks in use.
    """

    bin_seconds: float
    rows: Sequence[float]
    prompt_tokens_per_second: Sequence[float]
    output_tokens_per_second: Sequence[float]
    batch_size: Levels
    kv_usage: Levels


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """One run of a job.

    Args:
        job_id: Also the `job` tag of its metrics.
        status: "finished", "failed" or "running". A run that was left early by its consumer is finished, with
            fewer rows than `total_rows`.
        error: What a failed job failed of.
        gap: What the report lacks, if its statistics were lost on the way.
        started_at: ISO 8601, UTC.
        seconds: From the begin of the execution to its end.
        settings: How it was asked for.
        total_rows: Rows that went into the first operator, as far as Ray Data knew.
        rows: Rows that left the last operator, failed ones included; each counts once.
        failed_rows: Of these, rows with an error.
        generated_rows, prompt_tokens, output_tokens: That came out of the engines: work that was lost with a replica
            and done again counts again.
        first_ready: When the first engine took rows: the start-up. None if none did.
        first_row, last_row: When a block of rows first and last left the last operator.
        steady: Between start and end, see there; None without rows.
        mean_batch_size: Mean of `timeline.batch_size` while rows were in the engines.
        mean_kv_usage, peak_kv_usage: The same of the KV blocks, and their maximum.
        idle_share, starved_share: Over all replicas, each from its readiness to its end, see `ReplicaReport`.
        errors: Failed rows by kind: "ValueError (engine)".
        replicas: Each process that was a replica.
        timeline: Over time.
    """

    job_id: str
    status: str
    error: str | None
    gap: str | None
    started_at: str
    seconds: float
    model: str
    settings: Mapping[str, Any]
    total_rows: int | None
    rows: int
    failed_rows: int
    generated_rows: int
    prompt_tokens: int
    output_tokens: int
    first_ready: float | None
    first_row: float | None
    last_row: float | None
    steady: Steady | None
    mean_batch_size: float | None
    mean_kv_usage: float | None
    peak_kv_usage: float | None
    idle_share: float | None
    starved_share: float | None
    errors: Mapping[str, ErrorKind]
    replicas: Sequence[ReplicaReport]
    timeline: TimelineReport

    @classmethod
    def of(
        cls,
        settings: JobSettings,
        snapshot: Snapshot | None,
        *,
        job_id: str,
        status: str,
        error: str | None,
        started_at: float,
        ended_at: float,
        total_rows: int | None = None,
        gap: str | None = None,
    ) -> JobReport:
        """Work out a report.

        Args:
            settings: How the job was asked for.
            snapshot: What was gathered; None if everything was lost.
            job_id: The job's.
            status: How it stands.
            error: What it failed of.
            started_at, ended_at: As of `time.time()`.
            total_rows: Rows expected.
            gap: What the snapshot lacks.
        """
        data = snapshot or _NOTHING
        replicas = [_replica(name, record, data.timeline) for name, record in data.replicas.items()]
        timeline = _timeline(data)
        totals = data.totals
        observed, idle, starved = (_sum(data, series) for series in ("observed", "idle", "starved"))
        busy_bins = [value for value in timeline.batch_size.mean if value]
        kv_bins = [kv for kv, rows in zip(timeline.kv_usage.mean, timeline.batch_size.mean, strict=True) if rows]
        return cls(
            job_id=job_id,
            status=status,
            error=None if error is None else redact(error, settings.secrets),
            gap=gap,
            started_at=datetime.fromtimestamp(started_at, UTC).isoformat(timespec="seconds"),
            seconds=ended_at - started_at,
            model=redact(settings.model, settings.secrets),
            settings=redact_tree(settings.shown, settings.secrets),
            total_rows=None if total_rows is None else max(total_rows, totals.rows_finished),
            rows=totals.rows_finished,
            failed_rows=totals.rows_failed,
            generated_rows=totals.rows_generated,
            prompt_tokens=totals.prompt_tokens,
            output_tokens=totals.output_tokens,
            first_ready=min((r.ready for r in replicas if r.ready is not None), default=None),
            first_row=data.first_row_seconds,
            last_row=data.last_row_seconds,
            steady=_steady(timeline),
            mean_batch_size=_mean(busy_bins),
            mean_kv_usage=_mean([kv for kv in kv_bins if kv is not None]),
            peak_kv_usage=max((value for value in timeline.kv_usage.high if value is not None), default=None),
            idle_share=_share(idle, observed),
            starved_share=_share(starved, observed),
            errors={
                kind: error._replace(example=redact(error.example, settings.secrets)[:_EXAMPLE_CHARACTERS])
                for kind, error in sorted(data.errors.items(), key=lambda entry: -entry[1].rows)
            },
            replicas=replicas,
            timeline=timeline,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {**dataclasses.asdict(self), "errors": {kind: error._asdict() for kind, error in self.errors.items()}}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(_rounded(self.to_dict()), indent=1, default=str)

    def to_html(self) -> str:
        """The report as a page that needs nothing else."""
        from raydata_llm.report_html import report_html

        return report_html(self)

    def save(self, folder: str, filesystem: Any = None) -> list[str]:
        """Write the page and the JSON; returns their paths.

        Args:
            folder: A local or remote folder ("s3://bucket/answers/_reports"); it is made if it is not there.
            filesystem: A pyarrow or fsspec file system to write through; None takes the address's own.

        Raises:
            ValueError: for a folder that cannot be written.
        """
        name = f"report-{self.started_at[:19].replace(':', '').replace('-', '')}-{self.job_id}"
        texts = {f"{name}.html": self.to_html(), f"{name}.json": self.to_json()}
        return write_texts(folder, texts, filesystem=filesystem)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    @property
    def rows_per_second(self) -> float:
        """Rows over the whole run, start-up included."""
        return self.rows / max(self.seconds, 1e-9)


_NOTHING = Snapshot(
    seconds=0.0,
    totals=Totals(),
    errors={},
    replicas={},
    timeline=Timeline(),
    first_row_seconds=None,
    last_row_seconds=None,
)


def _lines(report: JobReport) -> Iterator[str]:
    of_total = f" of {count(report.total_rows)}" if report.total_rows else ""
    seconds = max(report.seconds, 1e-9)
    yield f"raydata_llm  job {report.job_id} {report.status}, {duration(report.seconds)}"
    if report.error:
        yield f"  failed of   {report.error.splitlines()[0][:_EXAMPLE_CHARACTERS]}"
    if report.gap:
        yield f"  note        {report.gap}"
    yield (
        f"  rows        {count(report.rows)}{of_total}, {count(report.failed_rows)} failed; "
        f"{rate(report.rows_per_second)} rows/s, start-up included"
    )
    yield (
        f"  tokens      in {count(report.prompt_tokens)} ({rate(report.prompt_tokens / seconds)}/s), "
        f"out {count(report.output_tokens)} ({rate(report.output_tokens / seconds)}/s)"
    )
    if report.first_ready is not None:
        first_row = "" if report.first_row is None else f", {duration(report.first_row)} to the first rows"
        yield f"  start-up    {duration(report.first_ready)} to the first engine{first_row}"
    steady = report.steady
    if steady is not None and steady.rows_per_second is not None:
        yield (
            f"  steady      {rate(steady.rows_per_second)} rows/s, in {rate(steady.prompt_tokens_per_second or 0)} "
            f"out {rate(steady.output_tokens_per_second or 0)} tokens/s (rows 10 % to 90 %)"
        )
    if report.mean_batch_size is not None:
        kv = (
            "" if report.mean_kv_usage is None else f", KV {report.mean_kv_usage:.0%} (peak {report.peak_kv_usage:.0%})"
        )
        yield f"  engines     {len(report.replicas)}, {report.mean_batch_size:,.1f} rows in a batch{kv}"
    if report.idle_share is not None and report.starved_share is not None:
        between = report.idle_share - report.starved_share
        starved = f"{report.starved_share:.1%} without rows"
        yield f"  idle        {report.idle_share:.1%}: {starved}, {between:.1%} between steps"
    for kind, error in report.errors.items():
        yield f"  error       {count(error.rows)} x {kind}: {error.example.splitlines()[0]}"


def _replica(name: str, record: ReplicaRecord, timeline: Timeline) -> ReplicaReport:
    observed, idle, starved = (timeline.totals(name, series) for series in ("observed", "idle", "starved"))
    return ReplicaReport(
        name=name,
        phases=[(start, phase) for start, phase in record.phases],
        ready=record.ready_seconds,
        last_seen=record.seen,
        rows=record.last.rows_done,
        prompt_tokens=record.last.prompt_tokens,
        output_tokens=record.last.output_tokens,
        idle_share=_share(sum(idle), sum(observed)),
        starved_share=_share(sum(starved), sum(observed)),
        busy=[
            None if not span else min(1.0, max(0.0, 1 - wasted / span))
            for wasted, span in zip(idle, observed, strict=True)
        ],
    )


def _timeline(data: Snapshot) -> TimelineReport:
    width, names = data.timeline.bin_seconds, list(data.replicas)
    # The last bin has only begun; its rate is over the part that there was.
    last = max(data.seconds - (data.timeline.num_bins - 1) * width, width / 10)

    def per_second(owners: Sequence[str], series: str) -> list[float]:
        columns = [data.timeline.totals(owner, series) for owner in owners]
        sums = [sum(column) for column in zip(*columns, strict=True)] if columns else [0.0] * data.timeline.num_bins
        return [value / (width if number < len(sums) - 1 else min(width, last)) for number, value in enumerate(sums)]

    return TimelineReport(
        bin_seconds=width,
        rows=data.timeline.totals(JOB, "rows"),
        prompt_tokens_per_second=per_second(names, "prompt_tokens"),
        output_tokens_per_second=per_second(names, "output_tokens"),
        batch_size=_levels([data.timeline.means(name, "running") for name in names], data.timeline.num_bins),
        kv_usage=_levels([data.timeline.means(name, "kv_usage") for name in names], data.timeline.num_bins),
    )


def _levels(columns: Sequence[Sequence[float | None]], num_bins: int) -> Levels:
    by_bin = [[column[number] for column in columns] for number in range(num_bins)]
    seen = [[value for value in values if value is not None] for values in by_bin]
    return Levels(
        mean=[_mean(values) for values in seen],
        low=[min(values, default=None) for values in seen],
        high=[max(values, default=None) for values in seen],
    )


def _steady(timeline: TimelineReport) -> Steady | None:
    width = timeline.bin_seconds
    rows = timeline.rows
    total = sum(rows)
    if not total:
        return None
    start, end = (_time_of(share * total, rows, width) for share in (_STEADY_FROM, _STEADY_TO))
    first, last = int(start / width) + 1, int(end / width)  # the bins that lie whole within

    def mean(per_second: Sequence[float]) -> float | None:
        return None if last - first < 2 else sum(per_second[first:last]) / (last - first)

    return Steady(
        start=start,
        end=end,
        rows_per_second=None if last - first < 2 else (_STEADY_TO - _STEADY_FROM) * total / (end - start),
        prompt_tokens_per_second=mean(timeline.prompt_tokens_per_second),
        output_tokens_per_second=mean(timeline.output_tokens_per_second),
    )


def _time_of(wanted: float, rows: Sequence[float], width: float) -> float:
    """When so many rows were out, within a bin by proportion."""
    out = 0.0
    for number, value in enumerate(rows):
        if out + value >= wanted and value:
            return (number + (wanted - out) / value) * width
        out += value
    return len(rows) * width


def _sum(data: Snapshot, series: str) -> float:
    return sum(sum(data.timeline.totals(name, series)) for name in data.replicas)


def _share(part: float, whole: float) -> float | None:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {str(name): _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
