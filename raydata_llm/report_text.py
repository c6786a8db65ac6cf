"""A job's report as lines of text, for a terminal or a log.

Owns the wording; figures and units are `job_progress`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raydata_llm.job_progress import count, duration, rate

if TYPE_CHECKING:
    from raydata_llm.job_report import JobReport

_LINE_CHARACTERS = 300


def report_text(report: JobReport) -> str:
    """The report."""
    return "\n".join(_lines(report))


def _lines(report: JobReport) -> Iterator[str]:
    of_total = f" of {count(report.total_rows)}" if report.total_rows else ""
    skipped = f", {count(report.skipped_rows)} written before" if report.skipped_rows else ""
    seconds = max(report.seconds, 1e-9)
    yield f"raydata_llm  job {report.job_id} {report.status}, {duration(report.seconds)}"
    if report.error:
        yield f"  failed of   {report.error.splitlines()[0][:_LINE_CHARACTERS]}"
    if report.gap:
        yield f"  note        {report.gap}"
    yield (
        f"  rows        {count(report.rows)}{of_total}{skipped}, {count(report.failed_rows)} failed; "
        f"{rate(report.rows_per_second)} rows/s, start-up included"
    )
    yield (
        f"  tokens      in {count(report.prompt_tokens)} ({rate(report.prompt_tokens / seconds)}/s), "
        f"out {count(report.output_tokens)} ({rate(report.output_tokens / seconds)}/s)"
    )
    if report.first_ready is not None:
        first_row = "" if report.first_row is None else f", {duration(report.first_row)} to the first row"
        yield f"  start-up    {duration(report.first_ready)} to the first engine{first_row}"
    steady = report.steady
    if steady is not None and steady.rows_per_second is not None:
        tokens = f"out {rate(steady.output_tokens_per_second or 0)} tokens/s"
        # A small job's prompts are all read before the span begins.
        tokens = f"in {rate(steady.prompt_tokens_per_second)} {tokens}" if steady.prompt_tokens_per_second else tokens
        before = "" if steady.prompt_tokens_per_second or not report.prompt_tokens else "; all prompts were read before"
        yield f"  steady      {rate(steady.rows_per_second)} rows/s, {tokens} (rows 10 % to 90 %{before})"
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
