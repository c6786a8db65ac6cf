"""A job's progress as one line of text.

Owns the wording and the units. Knows no Ray and no terminal.

    raydata_llm  12,345/100,000 rows (12%), 9,000 written | 310 rows/s | in 45.2k out 71.9k tokens/s |
    running 1,021 waiting 410 | KV 73% | 3 errors | 4m 42s left
    raydata_llm  starting, 38s | loading the weights (3 replicas, 21s) | fetching the model (1 replica, 38s)
"""

from __future__ import annotations

from collections.abc import Iterator

from raydata_llm.job_stats import Progress

WAITING_FOR_PLACE = "waiting for a place in the cluster"


def progress_line(
    progress: Progress, *, pool_size: int, restarting_s: float | None = None, rows_written: int | None = None
) -> str:
    """The line.

    Args:
        progress: The job now.
        pool_size: Replicas that are expected at least.
        restarting_s: How long ago the dispatcher was lost, until another one serves.
        rows_written: Rows in files that a sink of ours has committed; None without one.
    """
    return "raydata_llm  " + " | ".join(_parts(progress, pool_size, restarting_s, rows_written))


def stop_line(rows_answered: int, rows_written: int) -> str:
    """What a job that was stopped early leaves, so that nobody takes an answered row for a written one."""
    rest = max(0, rows_answered - rows_written)
    unwritten = f"; {count(rest)} more were answered, in blocks that are not complete, and are not written"
    return f"raydata_llm  stopped: {count(rows_written)} rows are written{unwritten if rest else ''}"


def count(number: float) -> str:
    """A whole number with separators: 12,345."""
    return f"{number:,.0f}"


def rate(number: float) -> str:
    """A rate in few digits: 0.35, 7.2, 310, 45.2k, 1.3M."""
    for start, size, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= start:
            return f"{number / size:.1f}".removesuffix(".0") + suffix
    if number >= 100:
        return f"{number:,.0f}"
    text = f"{number:.1f}" if number >= 1 else f"{number:.2f}"
    return text.rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4s, 12s, 4m 42s, 3h 05m, 2d 4h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24}h"


def _parts(progress: Progress, pool_size: int, restarting_s: float | None, rows_written: int | None) -> Iterator[str]:
    totals = progress.totals
    begun = totals.rows_answered > 0
    if begun:
        yield _rows(progress) + ("" if rows_written is None else f", {count(rows_written)} written")
        yield f"{rate(progress.rows_per_second)} rows/s"
    else:
        verb = "waiting for the first row" if progress.num_ready else "starting"
        yield f"{verb}, {duration(progress.seconds)}"
    if begun or progress.num_ready:
        yield from _engines(progress)
    if begun:
        yield f"{count(totals.rows_failed)} error{'' if totals.rows_failed == 1 else 's'}"
        yield "time left unknown" if progress.eta_seconds is None else f"{duration(progress.eta_seconds)} left"
    if restarting_s is None:
        yield from _phases(progress, pool_size)
    else:
        # Its replicas ended with it, and the next one starts new ones.
        yield f"the dispatcher's process was lost, another one is starting ({duration(restarting_s)})"


def _engines(progress: Progress) -> Iterator[str]:
    tokens_in, tokens_out = rate(progress.prompt_tokens_per_second), rate(progress.output_tokens_per_second)
    yield f"in {tokens_in} out {tokens_out} tokens/s"
    yield f"running {count(progress.num_running)} waiting {count(progress.num_waiting)}"
    if progress.kv_usage is not None:
        yield f"KV {progress.kv_usage:.0%}"


def _rows(progress: Progress) -> str:
    done, skipped = progress.totals.rows_answered, progress.totals.rows_skipped
    before = f", {count(skipped)} written before" if skipped else ""
    if not progress.total_rows:
        return f"{count(done)} rows{before}"
    # Ray Data's total is a guess at first.
    total = max(progress.total_rows, progress.totals.rows_finished + skipped)
    done = min(done, total - skipped)  # what a dead replica had answered, another did again
    return f"{count(done)}/{count(total)} rows ({(done + skipped) / total:.0%}){before}"


def _phases(progress: Progress, pool_size: int) -> Iterator[str]:
    for phase, (replicas, seconds) in progress.phases.items():
        yield f"{phase} ({_replicas(replicas)}, {duration(seconds)})"
    missing = pool_size - progress.num_ready - sum(replicas for replicas, _ in progress.phases.values())
    if missing > 0:
        yield f"{WAITING_FOR_PLACE} ({_replicas(missing)})"


def _replicas(number: int) -> str:
    return f"{number} replica{'' if number == 1 else 's'}"
