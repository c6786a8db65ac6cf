"""What a replica tells of itself a few times a second: counts since its process began, so a lost one costs nothing.

Owns the words of the message and how an engine's figures become counts that never fall, though the engine may be
replaced. Knows no threads and no Ray.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class EngineFigures(NamedTuple):
    """What a job's statistics use of `engine.EngineStats`, see there; None is what an engine does not tell."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_computed_tokens: int | None = None
    num_sampled_tokens: int | None = None
    idle_seconds: float | None = None
    starved_seconds: float | None = None

    @classmethod
    def of(cls, stats: object) -> EngineFigures:
        """The figures of an engine's stats."""
        return cls(**{name: getattr(stats, name) for name in cls._fields if hasattr(stats, name)})


class ReplicaSample(NamedTuple):
    """A replica as it is.

    Args:
        replica: A name of this process alone.
        node: Where it runs.
        phase: What it does: "loading the weights", or "running".
        running: Whether its engine takes rows.
        rows_held: Rows of the blocks that it works on.
        rows_done: Rows that came out of its engine, good and bad.
        prompt_tokens, output_tokens: Of these rows.
        figures: The engine's; None while it starts, or if it tells none.
    """

    replica: str
    node: str
    phase: str
    running: bool
    rows_held: int
    rows_done: int
    prompt_tokens: int
    output_tokens: int
    figures: EngineFigures | None


_COUNTED = ("num_computed_tokens", "num_sampled_tokens", "idle_seconds", "starved_seconds")


class SteadyCounts:
    """Makes one engine's counts of those of an engine and its successors."""

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}
        self._last: dict[str, Any] = {}

    def continued(self, figures: EngineFigures) -> EngineFigures:
        """The figures, with the predecessors' counts added."""
        counts = {name: getattr(figures, name) for name in _COUNTED if getattr(figures, name) is not None}
        # A new engine counts from 0, idle time included: one fallen count tells for all.
        if any(value < self._last.get(name, 0) for name, value in counts.items()):
            self._before = {name: self._before.get(name, 0) + self._last.get(name, 0) for name in counts}
        self._last = counts
        return figures._replace(**{name: value + self._before.get(name, 0) for name, value in counts.items()})
