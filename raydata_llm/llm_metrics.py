"""What `LLM.get_metrics` gives: vLLM's kinds of metric, read from the engine's counts.

Owns the metrics' names: as those of jobs' Prometheus metrics, where both have a figure. Knows only an engine's counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydata_llm.engine.engine_stats import EngineStats

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


def list_metrics(stats: EngineStats, model: str) -> list[Metric]:
    """The engine's counts as metrics."""
    labels = {"model_name": model}
    counters = [Counter(_PREFIX + name, getattr(stats, of), labels=labels) for name, of in _COUNTERS.items()]
    gauges = [Gauge(_PREFIX + name, getattr(stats, of), labels=labels) for name, of in _GAUGES.items()]
    return [*counters, *gauges]
