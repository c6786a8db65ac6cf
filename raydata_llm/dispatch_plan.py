"""What the dispatcher and the replicas are told: plain data, made on the driver.

Knows neither Ray nor a model, so that a driver can make it without importing either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydata_llm.replica import EngineFactory


@dataclass(frozen=True, kw_only=True, repr=False)
class ReplicaPlan:
    """How replicas are started.

    Args:
        model_source: The model, as the user named it.
        engine_kwargs: The engine's settings on this pool.
        actor_options: Ray's options of the actor.
        max_pending_rows: Rows that a replica may have at once, instead of a multiple of what it runs at once.
        hang_timeout_s: Silence after which an engine with something to do counts as hung.
        engine_factory: For tests.
        stats_sender: A `JobLink` on the driver, which becomes a `StatsSender` on its way.
    """

    model_source: str
    engine_kwargs: Mapping[str, Any]
    actor_options: Mapping[str, Any]
    max_pending_rows: int | None
    hang_timeout_s: float
    engine_factory: EngineFactory
    stats_sender: Any = None


@dataclass(frozen=True, kw_only=True, repr=False)
class DispatchPlan:
    """What the second operator is told.

    Args:
        min_replicas, max_replicas: The pool's bounds; it starts at the first.
        replica: How each is started.
        keep_going: Turn failures into error rows instead of raising.
        job_seed: Seed of rows without one.
        placement_timeout_s: Time in which at least one replica must find its place.
    """

    min_replicas: int
    max_replicas: int
    replica: ReplicaPlan
    keep_going: bool = False
    job_seed: int = 0
    placement_timeout_s: float = 30.0
