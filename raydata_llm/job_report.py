"""What a job did, how fast and why not faster: as figures, as text, as JSON and as a page.

Owns what each figure means. Knows no Ray. Credentials are masked when the report is made, so nothing that is written
from it holds any. Times are seconds since the run began.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from raydata_llm.job_stats import ErrorKind, Snapshot, Totals
from raydata_llm.job_timeline import Timeline
from raydata_llm.redaction import redact, redact_tree
from raydata_llm.report_figures import (
    ReplicaReport,
    Steady,
    TimelineReport,
    mean_of,
    replica_report,
    share,
    steady_span,
    timeline_report,
)
from raydata_llm.report_folder import write_texts
from raydata_llm.report_text import report_text

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
        skipped_rows: Rows that an earlier run had written (`ResumeConfig`); they are in `total_rows` alone.
        generated_rows, prompt_tokens, output_tokens: That came out of the engines: work that was lost with a replica
            and done again counts again.
        first_ready: When the first engine took rows: the start-up. None if none did.
        first_row: When the first row was through an engine.
        last_row: When the last block of rows left the last operator.
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
    skipped_rows: int
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
        replicas = [replica_report(name, record, data.timeline) for name, record in data.replicas.items()]
        timeline = timeline_report(data)
        totals = data.totals
        first_ready = min((r.ready for r in replicas if r.ready is not None), default=None)
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
            total_rows=None if total_rows is None else max(total_rows, totals.rows_finished + totals.rows_skipped),
            rows=totals.rows_finished,
            failed_rows=totals.rows_failed,
            skipped_rows=totals.rows_skipped,
            generated_rows=totals.rows_generated,
            prompt_tokens=totals.prompt_tokens,
            output_tokens=totals.output_tokens,
            first_ready=first_ready,
            first_row=data.first_row_seconds,
            last_row=data.last_row_seconds,
            steady=steady_span(timeline, first_ready),
            mean_batch_size=mean_of(busy_bins),
            mean_kv_usage=mean_of([kv for kv in kv_bins if kv is not None]),
            peak_kv_usage=max((value for value in timeline.kv_usage.high if value is not None), default=None),
            idle_share=share(idle, observed),
            starved_share=share(starved, observed),
            errors={
                redact(kind, settings.secrets): error._replace(
                    example=redact(error.example, settings.secrets)[:_EXAMPLE_CHARACTERS]
                )
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
        return report_text(self)

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


def _sum(data: Snapshot, series: str) -> float:
    return sum(sum(data.timeline.totals(name, series)) for name in data.replicas)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {str(name): _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
