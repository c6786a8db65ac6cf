"""A replica whose engine has several ranks: what each takes, and how its engine starts them.

Owns the choice between Ray actors in a placement group, which GPUs and resources asked for mean, and processes of the
replica's own node. Knows no tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raydata_llm.config import EngineProcessorConfig
from raydata_llm.redaction import hide_environment
from raydata_llm.replica import EngineFactory, RunningEngine, start_engine
from raydata_llm.replica_pool import ReplicaPool

if TYPE_CHECKING:
    from raydata_llm.cluster.gang import GangPlan


def engine_factory(config: EngineProcessorConfig, pool: ReplicaPool) -> EngineFactory:
    """How replicas start their engines."""
    num_ranks = config.engine_config().num_ranks
    bundles = rank_bundles(config, pool, num_ranks)
    if num_ranks == 1 or not bundles:
        return start_engine
    from raydata_llm.cluster.gang import GangPlan

    plan = GangPlan(
        bundles=[_of_type(bundle, config.accelerator_type) for bundle in bundles],
        strategy=config.placement_strategy,
        placement_timeout_s=config.placement_timeout_s,
        actor_options={} if config.runtime_env is None else {"runtime_env": hide_environment(config.runtime_env)},
    )
    return functools.partial(start_gang_engine, plan)


def rank_bundles(config: EngineProcessorConfig, pool: ReplicaPool, num_ranks: int) -> list[Mapping[str, float]]:
    """What each rank takes; nothing if they are processes of the replica's node."""
    given = config.replica_bundles
    if given is None:
        return [{"GPU": 1.0}] * num_ranks if pool.use_gpu else []
    return list(given) * num_ranks if len(given) == 1 else list(given)


def _of_type(bundle: Mapping[str, float], accelerator_type: str | None) -> Mapping[str, float]:
    """The bundle on GPUs of this type, if it takes one: an actor cannot ask for what its bundle does not hold."""
    if accelerator_type is None or not bundle.get("GPU"):
        return bundle
    return {**bundle, f"accelerator_type:{accelerator_type}": 0.001}


def start_gang_engine(
    plan: GangPlan, model_source: str, engine_kwargs: Mapping[str, Any]
) -> tuple[RunningEngine, Mapping[str, Any]]:
    """As `start_engine`, with ranks in a placement group."""
    from raydata_llm.cluster.gang import Gang

    serve = functools.partial(serve_rank, model_source)
    return start_engine(model_source, engine_kwargs, launch_ranks=lambda _: Gang(plan, serve))


def serve_rank(model_source: str, address: Any, rank: int, gpu: int) -> None:
    """Be a rank, with the model as its own node has it."""
    from raydata_llm.engine.rank_process import serve
    from raydata_llm.model_source import resolve_model

    def find_model(load_format: str) -> str:
        return resolve_model(model_source, load_format=load_format)

    serve(address, rank, gpu, find_model)
