"""What `LLM.get_metrics` gives: vLLM's kinds of metric, read from the engine's counts.

Owns the metrics' names: as those of jobs' Prometheus metrics, where both have a figure. Knows only an engine's counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydata_llm.engine.engine_stats import EngineStats
    from raydata_llm.engine.request import RequestOutput

_PREFIX = "raydata_llm:"
# Of EngineStats: those that only go up, then those that go both ways.
_COUNTERS = {
    "prompt_tokens": "num_prompt_tokens",
    "output_tokens": "num_output_tokens",
    "computed_tokens": "num_computed_tokens",
    "sampled_tokens": "num_sampled_tokens",
    "steps": "num_steps",
    "decode_rows": "num_decode_rows",
    "preemptions": "num_preemptions",
    "idle_seconds": "idle_seconds",
    "starved_seconds": "starved_seconds",
}
_GAUGES = {"running_rows": "num_running", "waiting_rows": "num_waiting", "kv_usage": "kv_usage"}


@dataclass(frozen=True)
class Metric:
    """A figure of the engine.

    Args:
        name: Such as `raydata_llm:output_tokens`.
        labels: The model.
    """

    name: str
    labels: dict[str, str] = field(kw_only=True, default_factory=dict)


@dataclass(frozen=True)
class Counter(Metric):
    """A sum since the engine started."""

    value: float


@dataclass(frozen=True)
class Gauge(Metric):
    """A figure as it is now."""

    value: float


@dataclass(frozen=True)
class Vector(Metric):
    """Counts by position, as vLLM has of speculative decoding. The engine has none yet."""

    values: list[int]


@dataclass(frozen=True)
class Histogram(Metric):
    """How often values came to how much.

    Args:
        count: Values.
        sum: Theirs together.
        buckets: By an upper limit, "+Inf" at last: how many values are no larger.
    """

    count: int
    sum: float
    buckets: dict[str, int]


class Observed:
    """A histogram under way."""

    def __init__(self, limits: Sequence[float]) -> None:
        self._limits = list(limits)
        self._counts = [0] * (len(self._limits) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def histogram(self, name: str, labels: dict[str, str]) -> Histogram:
        """What was counted so far."""
        totals = list(accumulate(self._counts))
        names = [*(f"{limit:g}" for limit in self._limits), "+Inf"]
        return Histogram(name, totals[-1], self._sum, dict(zip(names, totals, strict=True)), labels=labels)


_TOKEN_LIMITS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000]


class RequestHistograms:
    """How many tokens finished prompts had, and their outputs."""

    def __init__(self) -> None:
        self._prompt, self._output = Observed(_TOKEN_LIMITS), Observed(_TOKEN_LIMITS)

    def add(self, output: RequestOutput) -> None:
        """Count a result; those that failed are left out."""
        if output.error is None:
            self._prompt.add(len(output.prompt_token_ids))
            self._output.add(sum(len(one.token_ids) for one in output.outputs))

    def metrics(self, model: str) -> list[Metric]:
        """Both histograms."""
        labels = {"model_name": model}
        named = {"request_prompt_tokens": self._prompt, "request_output_tokens": self._output}
        return [observed.histogram(_PREFIX + name, labels) for name, observed in named.items()]


def list_metrics(stats: EngineStats, model: str) -> list[Metric]:
    """The engine's counts as metrics."""
    labels = {"model_name": model}
    counters = [Counter(_PREFIX + name, getattr(stats, of), labels=labels) for name, of in _COUNTERS.items()]
    gauges = [Gauge(_PREFIX + name, getattr(stats, of), labels=labels) for name, of in _GAUGES.items()]
    return [*counters, *gauges]
