"""The charts of a report page, as SVG text: lines over time, and one strip of time for each engine.

Owns geometry, marks and labels; colours are CSS classes of the page. Knows no reports. Times are seconds from the left
edge; a value of None is a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from raydata_llm.job_progress import duration

WIDTH, HEIGHT = 440, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 24
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
_MAX_TIME_MARKS = 7
# Character width of the labels' font, for what must not overlap.
_CHARACTER = 6.2

Values = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series.

    Args:
        name: In the tooltip.
        values: A value a bin.
        low, high: Around it, drawn as a band.
    """

    name: str
    values: Values
    low: Values | None = None
    high: Values | None = None


def line_chart(
    line: Line,
    *,
    bin_seconds: float,
    seconds: float,
    start_up: float | None,
    label: Callable[[float], str],
    top: float | None = None,
) -> str:
    """Values over time.

    Args:
        line: What is drawn.
        bin_seconds: Width of a bin.
        seconds: The right edge.
        start_up: Until when the time is shaded.
        label: A value as text.
        top: Of the value axis; None takes a round number above all values.
    """
    highest = max((value for value in (line.high or line.values) if value is not None), default=0.0)
    marks = value_marks(top if top is not None else highest)
    scale = _Scale(max(seconds, bin_seconds), marks[-1])
    parts = [
        *_shade(scale, start_up),
        *_value_axis(scale, marks, label),
        *_time_axis(scale, HEIGHT - _BOTTOM + 16),
        *_band(scale, line, bin_seconds),
        f'<path class="area" d="{_area(scale, line.values, bin_seconds)}"/>',
        f'<path class="line" d="{_path(scale, line.values, bin_seconds)}"/>',
        f'<line class="cursor" y1="{_TOP}" y2="{_TOP + _PLOT_HEIGHT}" x1="0" x2="0"/>',
    ]
    data = {
        "name": line.name,
        "bin": bin_seconds,
        "seconds": scale.seconds,
        "left": _LEFT,
        "width": _PLOT_WIDTH,
        "texts": [None if value is None else label(value) for value in line.values],
        "bands": _band_texts(line, label),
    }
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(line.name)} over time" '
        f'data-chart="{escape(json.dumps(data))}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One engine's time.

    Args:
        label: At its left.
        phases: (start, what it did) until it ran.
        ready: When it ran; None if it never did.
        end: Its last sign of life.
        busy: Share a bin of the time in which a step was in flight; None where the engine does not tell.
    """

    label: str
    phases: Sequence[tuple[float, str]]
    ready: float | None
    end: float
    busy: Values


def strip_chart(strips: Sequence[Strip], *, bin_seconds: float, seconds: float) -> str:
    """A strip for each engine, darker where it was busier."""
    width, left = 2 * WIDTH + 16, 74
    row = 20 if len(strips) <= 20 else 12
    height = _TOP + row * len(strips) + _BOTTOM
    scale = _Scale(max(seconds, bin_seconds), 1.0, left=left, width=width - left - _RIGHT)
    parts = list(_time_axis(scale, height - 8, grid_bottom=height - _BOTTOM))
    for number, strip in enumerate(strips):
        y = _TOP + row * number
        parts.append(f'<text class="label" x="{left - 8}" y="{y + row / 2 + 3:.1f}">{escape(strip.label)}</text>')
        parts += _strip(scale, strip, y + 1.5, row - 3, bin_seconds)
    return f'<svg class="strips" viewBox="0 0 {width} {height}" role="img" aria-label="engines">{"".join(parts)}</svg>'


def value_marks(highest: float) -> list[float]:
    """Three to eight round numbers from 0 to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    raw = highest / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [step * number for number in range(math.ceil(highest / step * 0.999) + 1)]


def time_marks(seconds: float) -> list[float]:
    """Round times from 0 on, at most seven after it."""
    step = next((step for step in _TIME_STEPS if seconds / step <= _MAX_TIME_MARKS), 86400.0)
    while seconds / step > _MAX_TIME_MARKS:
        step *= 2
    return [step * number for number in range(int(seconds / step + 1e-6) + 1)]


def time_label(seconds: float) -> str:
    """A round time, short: 0, 0.5s, 30s, 5m, 1h 30m, 2d."""
    if seconds == 0:
        return "0"
    if seconds < 60:
        return f"{seconds:g}s"
    minutes, rest = divmod(round(seconds), 60)
    if rest:
        return f"{minutes}m {rest:02d}s"
    days, rest_minutes = divmod(minutes, 24 * 60)
    hours, minutes = divmod(rest_minutes, 60)
    parts = [f"{days}d" * bool(days), f"{hours}h" * bool(hours), f"{minutes}m" * bool(minutes)]
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class _Scale:
    """Seconds and values to coordinates."""

    seconds: float
    top: float
    left: float = _LEFT
    width: float = _PLOT_WIDTH

    def x(self, seconds: float) -> float:
        return self.left + self.width * min(max(seconds, 0.0), self.seconds) / self.seconds

    def y(self, value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - min(max(value, 0.0), self.top) / self.top)


def _shade(scale: _Scale, start_up: float | None) -> Iterator[str]:
    if start_up is None:
        return
    end = scale.x(start_up)
    yield (
        f'<rect class="start-up" x="{scale.left}" y="{_TOP}" width="{end - scale.left:.1f}" height="{_PLOT_HEIGHT}"/>'
    )
    if end - scale.left > 9 * _CHARACTER:
        yield f'<text class="note" x="{scale.left + 6}" y="{_TOP + 13}">start-up</text>'


def _value_axis(scale: _Scale, marks: Sequence[float], label: Callable[[float], str]) -> Iterator[str]:
    for mark in marks:
        y = scale.y(mark)
        yield f'<line class="grid" x1="{scale.left}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="label" x="{scale.left - 8}" y="{y + 3.5:.1f}">{escape(label(mark))}</text>'


def _time_axis(scale: _Scale, y: float, grid_bottom: float | None = None) -> Iterator[str]:
    for mark in time_marks(scale.seconds):
        x, text = scale.x(mark), time_label(mark)
        # A label at the right edge ends there.
        half = len(text) * _CHARACTER / 2
        x_text = min(x, scale.left + scale.width - half + _RIGHT - 2)
        if grid_bottom is not None:
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{grid_bottom}"/>'
        yield f'<text class="time" x="{x_text:.1f}" y="{y}">{text}</text>'


def _points(scale: _Scale, values: Values, bin_seconds: float) -> Iterator[list[tuple[float, float]]]:
    """Runs of points without a gap, each in the middle of its bin."""
    run: list[tuple[float, float]] = []
    for number, value in enumerate(values):
        if value is not None:
            run.append((scale.x((number + 0.5) * bin_seconds), scale.y(value)))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _path(scale: _Scale, values: Values, bin_seconds: float) -> str:
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) for run in _points(scale, values, bin_seconds))


def _area(scale: _Scale, values: Values, bin_seconds: float) -> str:
    floor = scale.y(0)
    return "".join(
        f"M{run[0][0]:.1f} {floor:.1f}L" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) + f"L{run[-1][0]:.1f} {floor}Z"
        for run in _points(scale, values, bin_seconds)
    )


def _band(scale: _Scale, line: Line, bin_seconds: float) -> Iterator[str]:
    if line.low is None or line.high is None or list(line.low) == list(line.high):
        return
    lows, highs = _points(scale, line.low, bin_seconds), _points(scale, line.high, bin_seconds)
    for low, high in zip(lows, highs, strict=True):
        outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*high, *reversed(low)])
        yield f'<path class="band" d="M{outline}Z"/>'


def _band_texts(line: Line, label: Callable[[float], str]) -> list[str | None] | None:
    if line.low is None or line.high is None or list(line.low) == list(line.high):
        return None
    return [
        None if low is None or high is None else f"{label(low)} to {label(high)}"
        for low, high in zip(line.low, line.high, strict=True)
    ]


def _strip(scale: _Scale, strip: Strip, y: float, height: float, bin_seconds: float) -> Iterator[str]:
    def cell(start: float, end: float, css: str, title: str) -> str:
        x, width = scale.x(start), max(scale.x(end) - scale.x(start), 0.0)
        return (
            f'<rect class="{css}" x="{x:.1f}" y="{y}" width="{width + 0.3:.1f}" height="{height}">'
            f"<title>{escape(title)}</title></rect>"
        )

    ready = strip.end if strip.ready is None else strip.ready
    before = [(start, phase) for start, phase in strip.phases if start < ready]
    ends = [*(start for start, _ in before[1:]), ready]
    for (start, phase), end in zip(before, ends, strict=False):
        yield cell(start, end, "starting", f"{phase}, {duration(end - start)}")
    if strip.ready is None:
        return
    yield cell(ready, strip.end, "running", "running")
    for start, end, level in _levels(strip, bin_seconds, ready):
        yield cell(start, end, f"busy b{level}", f"about {level * 20} % busy, {time_label(round(start))} on")


def _levels(strip: Strip, bin_seconds: float, ready: float) -> Iterator[tuple[float, float, int]]:
    """(start, end, busy in fifths) of neighbouring bins that are equally busy."""
    start, level = ready, None
    for number, busy in enumerate(strip.busy):
        now = None if busy is None else round(busy * 5)
        if now != level:
            here = max(number * bin_seconds, ready)
            if level is not None:
                yield start, here, level
            start, level = here, now
    if level is not None:
        yield start, strip.end, level
