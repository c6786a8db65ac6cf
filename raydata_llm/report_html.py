"""A job's report as one HTML page that loads nothing: styles, charts and data lie in it.

Owns the page's order and wording; charts come from `report_charts`. Every text that is not ours is escaped. Light and
dark follow the reader's system.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate
from pathlib import PurePath
from statistics import fmean
from typing import Any

from raydata_llm.job_progress import count, duration, rate
from raydata_llm.job_report import JobReport
from raydata_llm.report_charts import Line, Strip, line_chart, strip_chart
from raydata_llm.report_figures import ReplicaReport
from raydata_llm.report_style import SCRIPT, STYLE

# A step's tokens come at once: over bins as short as a step, a rate is a comb.
_MAX_RATE_POINTS = 64
# More strips than these tell nothing more.
_MAX_STRIPS = 64


def report_html(report: JobReport) -> str:
    """The page."""
    title = f"{_model_name(report)}, job {report.job_id}"
    body = "\n".join(
        [
            _header(report),
            f'<section class="tiles">{"".join(_tiles(report))}</section>',
            _spans(report),
            f'<section class="charts">{"".join(_charts(report))}</section>',
            _engines(report),
            _errors(report),
            _settings(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><main>{body}</main><div id="tip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _model_name(report: JobReport) -> str:
    """A local model's file or folder, whose place says little; any other as it was named."""
    return PurePath(report.model).name if report.model.startswith(("/", ".")) else report.model


def _header(report: JobReport) -> str:
    notes = "".join(f'<p class="problem">{escape(text)}</p>' for text in (report.error, report.gap) if text)
    began = report.started_at.replace("T", " ").replace("+00:00", " UTC")
    return (
        f"<header><p class='product'>raydata_llm</p><h1>{escape(_model_name(report))}</h1>"
        f'<p class="sub"><span class="status {report.status}">{report.status}</span> '
        f"job {report.job_id} &middot; {began} &middot; {duration(report.seconds)}</p>{notes}</header>"
    )


def _tiles(report: JobReport) -> Iterator[str]:
    steady = report.steady
    rows = report.rows_per_second if steady is None else steady.rows_per_second or report.rows_per_second
    seconds = max(report.seconds, 1e-9)
    tokens_out = report.output_tokens / seconds
    tokens_in = report.prompt_tokens / seconds
    if steady is not None and steady.output_tokens_per_second is not None:
        tokens_out = steady.output_tokens_per_second
        # A small job's prompts are all read before the span begins: then the rate of the whole run stays.
        tokens_in = steady.prompt_tokens_per_second or tokens_in
    of_total = f"of {count(report.total_rows)}" if report.total_rows else "finished"
    failed = f", {count(report.failed_rows)} failed" if report.failed_rows else ", none failed"
    before = f", {count(report.skipped_rows)} written before" if report.skipped_rows else ""
    yield _tile("Rows", count(report.rows), of_total + before + failed)
    yield _tile("Rows/s", rate(rows), f"steady; {rate(report.rows_per_second)} in all")
    yield _tile("Output tokens/s", rate(tokens_out), f"{count(report.output_tokens)} in all")
    yield _tile("Prompt tokens/s", rate(tokens_in), f"{count(report.prompt_tokens)} in all")
    if report.idle_share is not None and report.starved_share is not None:
        yield _tile("Engine idle", f"{report.idle_share:.1%}", f"{report.starved_share:.1%} for want of rows")
    if report.mean_batch_size is not None:
        yield _tile("Batch size", f"{report.mean_batch_size:,.0f}", "mean of an engine")
    if report.mean_kv_usage is not None and report.peak_kv_usage is not None:
        yield _tile("KV cache in use", f"{report.mean_kv_usage:.0%}", f"mean; peak {report.peak_kv_usage:.0%}")


def _tile(name: str, value: str, note: str) -> str:
    return f'<div class="tile"><h3>{name}</h3><p class="value">{value}</p><p class="note">{note}</p></div>'


def _spans(report: JobReport) -> str:
    """Where the time went: start-up, generation, and what came after the last row."""
    ready = report.first_ready if report.first_ready is not None else report.seconds
    last = report.last_row if report.last_row is not None else report.seconds
    first = min(max(report.first_row if report.first_row is not None else last, ready), last)
    spans = [
        ("start", "start-up", ready, "until the first engine takes rows"),
        ("first", "to the first row", first - ready, "from then until a first row is answered"),
        ("steady", "rows", last - first, "from the first row to the last"),
        ("end", "end", report.seconds - last, "after the last row"),
    ]
    total = max(sum(seconds for _, _, seconds, _ in spans), 1e-9)
    bars = "".join(
        f'<i class="{css}" style="width:{100 * seconds / total:.2f}%" title="{text}"></i>'
        for css, _, seconds, text in spans
    )
    keys = "".join(
        f'<li title="{text}"><b class="{css}"></b>{name} <strong>{duration(max(seconds, 0.0))}</strong> '
        f"{seconds / total:.0%}</li>"
        for css, name, seconds, text in spans
    )
    return f'<section class="card"><h2>Where the time went</h2><div class="spans">{bars}</div><ul>{keys}</ul></section>'


def _charts(report: JobReport) -> Iterator[str]:
    timeline = report.timeline
    several = len(report.replicas) > 1
    spread = ", mean and range" if several else ""

    def chart(title: str, unit: str, line: Line, label: Any, top: float | None = None, group: int = 1) -> str:
        drawn = line_chart(
            line,
            bin_seconds=group * timeline.bin_seconds,
            seconds=report.seconds,
            start_up=report.first_ready,
            label=label,
            top=top,
        )
        return f'<figure class="card"><figcaption>{title} <span>{unit}</span></figcaption>{drawn}</figure>'

    def percent(value: float) -> str:
        return f"{value:.0%}"

    group = max(1, math.ceil(len(timeline.rows) / _MAX_RATE_POINTS))
    output = Line(name="output tokens/s", values=_grouped(timeline.output_tokens_per_second, group))
    prompt = Line(name="prompt tokens/s", values=_grouped(timeline.prompt_tokens_per_second, group))
    batch, kv = timeline.batch_size, timeline.kv_usage
    size = Line(name="sequences", values=batch.mean, low=batch.low, high=batch.high)
    used = Line(name="KV in use", values=kv.mean, low=kv.low, high=kv.high)
    # In all: few rows' rate is a comb.
    rows = Line(name="rows", values=list(accumulate(timeline.rows)))
    yield chart("Output tokens", "per second, all engines", output, rate, group=group)
    yield chart("Prompt tokens", "per second, all engines", prompt, rate, group=group)
    yield chart("Batch size", f"sequences of an engine{spread}", size, rate)
    yield chart("KV cache in use", f"share of blocks{spread}", used, percent, 1.0)
    yield chart("Rows answered", "in all", rows, rate)
    if any(replica.idle_share is not None for replica in report.replicas):
        yield chart("Engine busy", f"share of time with a step in flight{spread}", _busy(report.replicas), percent, 1.0)


def _grouped(values: Sequence[float], group: int) -> list[float]:
    """Means of neighbouring values."""
    return [fmean(values[start : start + group]) for start in range(0, len(values), group)]


def _busy(replicas: Sequence[ReplicaReport]) -> Line:
    seen = [
        [value for value in values if value is not None]
        for values in zip(*(replica.busy for replica in replicas), strict=True)
    ]
    return Line(
        name="busy",
        values=[sum(values) / len(values) if values else None for values in seen],
        low=[min(values, default=None) for values in seen],
        high=[max(values, default=None) for values in seen],
    )


def _engines(report: JobReport) -> str:
    if not report.replicas:
        return ""
    shown = report.replicas[:_MAX_STRIPS]
    strips = [
        Strip(label=f"engine {n}", phases=one.phases, ready=one.ready, end=one.last_seen, busy=one.busy)
        for n, one in enumerate(shown, start=1)
    ]
    drawn = strip_chart(strips, bin_seconds=report.timeline.bin_seconds, seconds=report.seconds)
    more = (
        f"<p class='note'>{len(shown)} of {len(report.replicas)} are shown.</p>"
        if len(shown) < len(report.replicas)
        else ""
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "process", "ready at", "rows", "out tokens", "idle", "no rows"))
    rows = "".join(_engine_row(number, replica) for number, replica in enumerate(shown, start=1))
    legend = (
        "<ul class='legend'><li><b class='starting'></b>starting</li><li><b class='busy b1'></b>20 %</li>"
        "<li><b class='busy b3'></b>60 %</li><li><b class='busy b5'></b>100 % of the time with a "
        "step in flight</li></ul>"
    )
    return (
        f"<section class='card'><h2>Engines</h2>{drawn}{legend}{more}"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _engine_row(number: int, replica: ReplicaReport) -> str:
    def share(value: float | None) -> str:
        return "&ndash;" if value is None else f"{value:.1%}"

    ready = "never" if replica.ready is None else duration(replica.ready)
    cells = [
        str(number),
        f"<code>{escape(replica.name)}</code>",
        ready,
        count(replica.rows),
        count(replica.output_tokens),
        share(replica.idle_share),
        share(replica.starved_share),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _errors(report: JobReport) -> str:
    if not report.errors:
        return ""
    rows = "".join(
        f"<tr><td>{count(error.rows)}</td><td>{escape(kind)}</td><td><code>{escape(error.example)}</code></td></tr>"
        for kind, error in report.errors.items()
    )
    return (
        "<section class='card'><h2>Rows that failed</h2><div class='scroll'><table class='errors'><thead><tr>"
        f"<th>rows</th><th>kind</th><th>the first one</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _settings(report: JobReport) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(_text(value))}</code></td></tr>"
        for name, value in report.settings.items()
    )
    return f"<section class='card'><h2>Settings</h2><table class='settings'><tbody>{rows}</tbody></table></section>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
