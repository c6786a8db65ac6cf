"""The figures of a job's report that are worked out of its timeline: by replica, over time, and in its steady span.

Owns their meaning. Knows neither the whole report nor its looks. Times are seconds since the run began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raydata_llm.job_stats import JOB, ReplicaRecord, Snapshot
from raydata_llm.job_timeline import Timeline

# Of all rows, the part that start and end do not touch.
_STEADY_FROM, _STEADY_TO = 0.1, 0.9
# Rows of few blocks come out in bursts: a span shorter than this part of the work says nothing of its rate.
_STEADY_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Steady:
    """The span in which rows 10 % to 90 % came through the engines: neither start-up nor tail.

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
        rows: Rows that came through the engines in the bin.
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


def replica_report(name: str, record: ReplicaRecord, timeline: Timeline) -> ReplicaReport:
    """What is known of one replica's process."""
    observed, idle, starved = (timeline.totals(name, series) for series in ("observed", "idle", "starved"))
    return ReplicaReport(
        name=name,
        phases=[(start, phase) for start, phase in record.phases],
        ready=record.ready_seconds,
        last_seen=record.seen,
        rows=record.last.rows_done,
        prompt_tokens=record.last.prompt_tokens,
        output_tokens=record.last.output_tokens,
        idle_share=share(sum(idle), sum(observed)),
        starved_share=share(sum(starved), sum(observed)),
        busy=[
            None if not span else min(1.0, max(0.0, 1 - wasted / span))
            for wasted, span in zip(idle, observed, strict=True)
        ],
    )


def timeline_report(data: Snapshot) -> TimelineReport:
    """The run over time, all replicas together."""
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
        mean=[mean_of(values) for values in seen],
        low=[min(values, default=None) for values in seen],
        high=[max(values, default=None) for values in seen],
    )


def steady_span(timeline: TimelineReport, first_ready: float | None) -> Steady | None:
    """The steady span of a run; without rates where rows came out in so few bursts that they would say nothing.

    Args:
        timeline: Of the run.
        first_ready: When the first engine took rows.
    """
    width, rows = timeline.bin_seconds, timeline.rows
    total = sum(rows)
    if not total:
        return None
    start, end = (_time_of(part * total, rows, width) for part in (_STEADY_FROM, _STEADY_TO))
    first, last = int(start / width) + 1, int(end / width)  # the bins that lie whole within
    told = last - first >= 2 and end - start > _STEADY_SHARE * (_time_of(total, rows, width) - (first_ready or 0.0))

    def mean(per_second: Sequence[float]) -> float | None:
        return sum(per_second[first:last]) / (last - first) if told else None

    return Steady(
        start=start,
        end=end,
        rows_per_second=(_STEADY_TO - _STEADY_FROM) * total / (end - start) if told else None,
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


def share(part: float, whole: float) -> float | None:
    """A part of a whole, 0 to 1; None of nothing."""
    return min(1.0, max(0.0, part / whole)) if whole > 0 else None


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None
