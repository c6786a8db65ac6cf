"""One job's statistics, gathered from its replicas and from the last operator: totals, what happened when, and errors.

Owns the arithmetic. Lives in an actor of its own (`job_link`), knows no Ray. Invariants: samples hold counts since a
replica's process began, so a lost or repeated one changes no total; a block of the last operator counts once, though
Ray Data may run it again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from raydata_llm.job_timeline import Timeline
from raydata_llm.replica_sample import EngineFigures, ReplicaSample

# The rates of the progress line are over this many seconds.
_RATE_SECONDS = 30.0
# From the first row to the first guess of the time left.
_GUESS_SECONDS = 10.0
# A replica unheard of for so long is counted as gone: its rows are not in an engine.
_SILENT_SECONDS = 15.0
# Kinds of errors told apart; a kind is made of an exception's type, of which there are few.
_MAX_KINDS = 50

JOB = ""  # the owner of what belongs to no replica


class ErrorKind(NamedTuple):
    """Rows that failed alike: how many, and the first one's message."""

    rows: int
    example: str


@dataclass(kw_only=True)
class ReplicaRecord:
    """One replica's process.

    Args:
        node: Where it runs.
        phases: (seconds since the job began, phase), in order; the last is what it does now.
        last: Its last sample.
        seen: When that came.
    """

    node: str
    last: ReplicaSample
    seen: float
    phases: list[tuple[float, str]] = field(default_factory=list)

    @property
    def ready_seconds(self) -> float | None:
        """When its engine first took rows."""
        return next((start for start, phase in self.phases if phase == RUNNING), None)


RUNNING = "running"


class Totals(NamedTuple):
    """Counts of a job so far."""

    rows_finished: int = 0
    rows_failed: int = 0
    rows_generated: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    rows_skipped: int = 0

    @property
    def rows_answered(self) -> int:
        """Rows that are through an engine, in whatever block: those that came out of the last operator are fewer."""
        return max(self.rows_generated, self.rows_finished)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a progress line shows.

    Args:
        seconds: Since the job began.
        totals: Counts so far.
        total_rows: Rows of the dataset, if known by now.
        rows_per_second, prompt_tokens_per_second, output_tokens_per_second: Over the last 30 s.
        num_running, num_waiting: Rows in the engines and queued before them.
        kv_usage: Mean share of the replicas' KV blocks in use; None if no engine tells.
        eta_seconds: Until the last row, at the present rate; None while unknown.
        phases: What replicas that take no rows yet do: phase to (replicas, longest seconds).
        num_ready: Replicas that take rows.
    """

    seconds: float
    totals: Totals
    total_rows: int | None
    rows_per_second: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    num_running: int
    num_waiting: int
    kv_usage: float | None
    eta_seconds: float | None
    phases: Mapping[str, tuple[int, float]]
    num_ready: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a report is made of; times are seconds since the job began.

    Args:
        seconds: When it was taken.
        first_row_seconds: When the first row was through an engine.
        last_row_seconds: When the last block of finished rows came out.
    """

    seconds: float
    totals: Totals
    errors: Mapping[str, ErrorKind]
    replicas: Mapping[str, ReplicaRecord]
    timeline: Timeline
    first_row_seconds: float | None
    last_row_seconds: float | None


class JobStats:
    """Gathers a job's statistics.

    Args:
        now: Seconds since the job began.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.replicas: dict[str, ReplicaRecord] = {}
        self.errors: dict[str, ErrorKind] = {}
        self.timeline = Timeline()
        self.first_row_seconds: float | None = None
        self.last_row_seconds: float | None = None
        self._rows_finished = self._rows_failed = self._rows_answered = 0
        # A flag for each task's first block (a job may have millions), and the few others.
        self._first_blocks = bytearray()
        self._other_blocks: set[tuple[int, int]] = set()
        self._skipped: dict[tuple[int, int], int] = {}
        self._recent: deque[tuple[float, Totals, int, int]] = deque()

    def push(self, sample: ReplicaSample) -> None:
        """Take a replica's sample."""
        seconds = self._now()
        record = self.replicas.get(sample.replica)
        if record is None:
            empty = sample._replace(rows_done=0, prompt_tokens=0, output_tokens=0, figures=None)
            record = self.replicas[sample.replica] = ReplicaRecord(node=sample.node, last=empty, seen=seconds)
        if not record.phases or record.phases[-1][1] != sample.phase:
            record.phases.append((seconds, sample.phase))
        self._bin(seconds, record.last, sample)
        since, record.last, record.seen = record.seen, sample, seconds
        self._note_answered(since, seconds)

    def count_block(self, block: tuple[int, int], num_rows: int, errors: Mapping[str, ErrorKind]) -> None:
        """Take the last operator's word for a block, once.

        Args:
            block: The task's number, and the block's within the task.
            num_rows: Its rows.
            errors: Those of them that failed.
        """
        if not self._is_new(block):
            return
        seconds = self._now()
        self._rows_finished += num_rows
        self._note_answered(seconds, seconds)
        self.last_row_seconds = seconds
        for kind, new in errors.items():
            self._rows_failed += new.rows
            known = self.errors.get(kind)
            if known is not None:
                self.errors[kind] = known._replace(rows=known.rows + new.rows)
            elif len(self.errors) < _MAX_KINDS:
                self.errors[kind] = new

    def skip_rows(self, block: tuple[int, int], num_rows: int) -> None:
        """Take the first operator's word for the rows of a block that an earlier run had written, once."""
        self._skipped[block] = num_rows

    def totals(self) -> Totals:
        """Counts so far."""
        lasts = [record.last for record in self.replicas.values()]
        return Totals(
            rows_finished=self._rows_finished,
            rows_failed=self._rows_failed,
            rows_generated=sum(last.rows_done for last in lasts),
            prompt_tokens=sum(last.prompt_tokens for last in lasts),
            output_tokens=sum(last.output_tokens for last in lasts),
            rows_skipped=sum(self._skipped.values()),
        )

    def progress(self, total_rows: int | None) -> Progress:
        """The job now."""
        seconds, totals = self._now(), self.totals()
        alive = [record for record in self.replicas.values() if seconds - record.seen < _SILENT_SECONDS]
        figures = [record.last.figures or EngineFigures(num_running=record.last.rows_held) for record in alive]
        rates = self._rates(seconds, totals, alive)
        left = None if total_rows is None else max(0, total_rows - totals.rows_answered - totals.rows_skipped)
        known = [figure for record, figure in zip(alive, figures, strict=True) if record.last.figures is not None]
        return Progress(
            seconds=seconds,
            totals=totals,
            total_rows=total_rows,
            rows_per_second=rates[0],
            prompt_tokens_per_second=rates[1],
            output_tokens_per_second=rates[2],
            num_running=sum(figure.num_running for figure in figures),
            num_waiting=sum(figure.num_waiting for figure in figures),
            kv_usage=sum(figure.kv_usage for figure in known) / len(known) if known else None,
            eta_seconds=left / rates[0] if left is not None and rates[0] > 0 and self._under_way(seconds) else None,
            phases=_phases(alive, seconds),
            num_ready=sum(record.last.running for record in alive),
        )

    def snapshot(self) -> Snapshot:
        """All that a report is made of."""
        return Snapshot(
            seconds=self._now(),
            totals=self.totals(),
            errors=self.errors,
            replicas=self.replicas,
            timeline=self.timeline,
            first_row_seconds=self.first_row_seconds,
            last_row_seconds=self.last_row_seconds,
        )

    def _under_way(self, seconds: float) -> bool:
        """Whether rows have come for long enough to guess from: the first ones' rate says hours of minutes."""
        return self.first_row_seconds is not None and seconds - self.first_row_seconds >= _GUESS_SECONDS

    def _note_answered(self, since: float, seconds: float) -> None:
        answered = self.totals().rows_answered
        if answered <= self._rows_answered:
            return
        self.timeline.add(JOB, "rows", answered - self._rows_answered, start=since, end=seconds)
        self._rows_answered = answered
        if self.first_row_seconds is None:
            self.first_row_seconds = seconds

    def _is_new(self, block: tuple[int, int]) -> bool:
        task, part = block
        if part:
            known = block in self._other_blocks
            self._other_blocks.add(block)
            return not known
        self._first_blocks.extend(bytes(max(0, task + 1 - len(self._first_blocks))))
        known = bool(self._first_blocks[task])
        self._first_blocks[task] = 1
        return not known

    def _rates(self, seconds: float, totals: Totals, alive: list[ReplicaRecord]) -> tuple[float, float, float]:
        """Rows, prompt tokens and output tokens a second, as seen by earlier calls of the last 30 s."""
        figures = [record.last.figures for record in alive if record.last.figures is not None]
        sampled = sum(figure.num_sampled_tokens or 0 for figure in figures)
        computed = sum(figure.num_computed_tokens or 0 for figure in figures)
        self._recent.append((seconds, totals, computed, sampled))
        while len(self._recent) > 1 and seconds - self._recent[0][0] > _RATE_SECONDS:
            self._recent.popleft()
        then, before, computed_before, sampled_before = self._recent[0]
        span = max(seconds - then, 1e-9)
        rows = totals.rows_answered - before.rows_answered
        # Tokens of rows that are still at work count too, where the engine tells.
        output = max(sampled - sampled_before, totals.output_tokens - before.output_tokens)
        prompt = max(computed - computed_before - output, totals.prompt_tokens - before.prompt_tokens)
        return rows / span, prompt / span, output / span

    def _bin(self, seconds: float, before: ReplicaSample, sample: ReplicaSample) -> None:
        if not sample.running:
            return
        since = self.replicas[sample.replica].seen
        since = since if before.running and seconds - since < _SILENT_SECONDS else seconds

        def add(series: str, value: float) -> None:
            self.timeline.add(sample.replica, series, value, start=since, end=seconds)

        def see(series: str, value: float) -> None:
            self.timeline.see(sample.replica, series, value, start=since, end=seconds)

        figures = sample.figures
        if figures is None:
            see("running", sample.rows_held)
            add("output_tokens", sample.output_tokens - before.output_tokens)
            add("prompt_tokens", sample.prompt_tokens - before.prompt_tokens)
            return
        then = before.figures or EngineFigures()
        see("running", figures.num_running)
        see("kv_usage", figures.kv_usage)
        output, prompt = _new_tokens(before, sample, then, figures)
        add("output_tokens", output)
        add("prompt_tokens", prompt)
        if then.idle_seconds is not None and figures.idle_seconds is not None:
            add("observed", seconds - self.replicas[sample.replica].seen)
            add("idle", figures.idle_seconds - then.idle_seconds)
            add("starved", (figures.starved_seconds or 0.0) - (then.starved_seconds or 0.0))


def _new_tokens(
    before: ReplicaSample, sample: ReplicaSample, then: EngineFigures, figures: EngineFigures
) -> tuple[int, int]:
    """Output and prompt tokens since the sample before: those of unfinished rows too, where the engine tells."""
    if figures.num_computed_tokens is None or figures.num_sampled_tokens is None:
        return sample.output_tokens - before.output_tokens, sample.prompt_tokens - before.prompt_tokens
    output = figures.num_sampled_tokens - (then.num_sampled_tokens or 0)
    computed = figures.num_computed_tokens - (then.num_computed_tokens or 0)
    # A step computes a token of each row that it samples, and the prompts' tokens.
    return output, max(0, computed - output)


def _phases(alive: list[ReplicaRecord], seconds: float) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for record in alive:
        if not record.last.running and record.phases:
            started, phase = record.phases[-1]
            count, longest = found.get(phase, (0, 0.0))
            found[phase] = (count + 1, max(longest, seconds - started))
    return found


def seconds_since(started_at: float) -> Callable[[], float]:
    """A clock of seconds since a moment of `time.time()`."""
    return lambda: time.time() - started_at
