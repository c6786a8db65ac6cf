"""Ranks as Ray actors: a placement group with a bundle each, and what runs in them is handed in.

Owns the group, the wait for its place, and the actors' ends. Knows no tokens and no engine: `serve(address, rank, gpu)`
is called in each actor and returns when there is nothing more to do. Invariant: a gang that ends frees its group;
where its process is gone, the group's keeper does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

Serve = Callable[[Any, int, int], None]

# The actor itself once its group is placed: a worker process that starts.
_START_SECONDS = 120.0
# How often a group's keeper looks after its owner, and how long it waits for the answer of a busy one.
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class GangPlan:
    """Where ranks are to be placed: plain data.

    Args:
        bundles: What each rank takes.
        strategy: PACK, STRICT_PACK, SPREAD or STRICT_SPREAD.
        placement_timeout_s: Time in which all of them must find their place.
        actor_options: Further options of each rank's actor, such as `runtime_env`.
    """

    bundles: Sequence[Mapping[str, float]]
    strategy: str = "PACK"
    placement_timeout_s: float = 30.0
    actor_options: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RankPlacement:
    """Where a rank came to be: its node's address and id, its process, and the GPUs that Ray gave it."""

    host: str
    pid: int
    node: str
    gpus: tuple[str, ...]


class RankActor:
    """One rank's process."""

    def where(self) -> RankPlacement:
        """Where it is, and which GPUs are its own."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return RankPlacement(host=host, pid=os.getpid(), node=context.get_node_id(), gpus=tuple(gpus))

    def run(self, serve: Serve, address: Any, rank: int, visible: Sequence[str]) -> None:
        """Be a rank until there is nothing more to do.

        Args:
            visible: The GPUs of all ranks on this node. Ray shows a process its own alone; ranks that are to map each
                other's memory must see each other's.
        """
        own = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        if len(own) == 1 and set(own) <= set(visible):
            # In time: CUDA reads it when it is first used, and no rank has imported torch yet.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
            return serve(address, rank, list(visible).index(own[0]))
        serve(address, rank, 0)


class GroupKeeper:
    """Makes a placement group and frees it when its owner is gone.

    Ray keeps a group that an actor made until the whole job ends, so that the next job of a driver would find its
    GPUs taken; a group of a detached actor ends with that actor. So this one is detached, and follows its owner.
    """

    def hold(self, bundles: list[dict[str, float]], strategy: str, owner: Any) -> PlacementGroup:
        """Make the group, and watch the actor that it is for."""
        group: PlacementGroup = placement_group(bundles, strategy=strategy)
        threading.Thread(target=self._follow, args=(owner, group), daemon=True).start()
        return group

    def _follow(self, owner: Any, group: PlacementGroup) -> None:
        while True:
            try:
                ray.get(owner.__ray_ready__.remote(), timeout=_ANSWER_SECONDS)
            except GetTimeoutError:
                continue
            except RayActorError:
                remove_placement_group(group)
                os._exit(0)
            time.sleep(_LOOK_SECONDS)


class RankOnRay:
    """A rank's actor, as its gang's owner sees it."""

    def __init__(self, gang: Gang, actor: Any, done: Any, place: str) -> None:
        self._gang, self._actor, self._done, self._place = gang, actor, done, place
        self._ended = False

    def end(self) -> None:
        """Kill it; the last one frees the group."""
        if not self._ended:
            self._ended = True
            ray.kill(self._actor)
            self._gang.leave()

    def fate(self) -> str | None:
        """How it ended, None while it runs."""
        ready, _ = ray.wait([self._done], timeout=0)
        if not ready:
            return None
        try:
            ray.get(self._done)
        except RayError as error:
            return f"{self._place}: {str(error).strip()}"
        return f"{self._place}: it returned"


def node_gpus(places: Sequence[RankPlacement], node: str) -> list[str]:
    """The GPUs of a node's ranks, in their order; nothing where a rank has none or several."""
    there = [place.gpus for place in places if place.node == node]
    return list(dict.fromkeys(gpus[0] for gpus in there)) if all(len(gpus) == 1 for gpus in there) else []


class Gang:
    """Starts ranks.

    Args:
        plan: Where.
        serve: What runs in each.
    """

    def __init__(self, plan: GangPlan, serve: Serve) -> None:
        self._plan, self._serve = plan, serve
        self._num_left = 0
        self._group: PlacementGroup | None = None
        self._keeper: Any = None
        self.host: str | None = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def launch(self, address: Any, num_ranks: int) -> list[RankOnRay]:
        """Place the ranks and start them.

        Raises:
            ValueError: when they find no place in time, with what was asked and what is free.
        """
        assert len(self._plan.bundles) == num_ranks, "a bundle for each rank"
        bundles = [dict(bundle) for bundle in self._plan.bundles]
        self._group = self._make_group(bundles)
        if not self._group.wait(self._plan.placement_timeout_s):
            message = self._describe_unplaced()
            self._free()
            raise ValueError(message)
        actors = [self._actor(rank, bundle) for rank, bundle in enumerate(bundles)]
        try:
            places = ray.get([actor.where.remote() for actor in actors], timeout=_START_SECONDS)
        except (RayError, GetTimeoutError) as error:
            self._free()
            raise ValueError(
                f"of {num_ranks} ranks that had their place, one could not start ({str(error).strip()}): its node is "
                "gone, or cannot start processes"
            ) from error
        self._num_left = num_ranks
        return [
            RankOnRay(
                self,
                actor,
                actor.run.remote(self._serve, address, rank, node_gpus(places, place.node)),
                f"process {place.pid} on {place.host}",
            )
            for rank, (actor, place) in enumerate(zip(actors, places, strict=True))
        ]

    def leave(self) -> None:
        """A rank has ended."""
        self._num_left -= 1
        if not self._num_left:
            self._free()

    def _make_group(self, bundles: list[dict[str, float]]) -> PlacementGroup:
        context = ray.get_runtime_context()
        if context.get_actor_id() is None:
            # A driver's group ends with the driver.
            alone: PlacementGroup = placement_group(bundles, strategy=self._plan.strategy)
            return alone
        self._keeper = ray.remote(GroupKeeper).options(lifetime="detached", num_cpus=0).remote()
        group: PlacementGroup = ray.get(
            self._keeper.hold.remote(bundles, self._plan.strategy, context.current_actor), timeout=_START_SECONDS
        )
        return group

    def _free(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
        if self._keeper is not None:
            ray.kill(self._keeper)
        self._group = self._keeper = None

    def _actor(self, rank: int, bundle: Mapping[str, float]) -> Any:
        assert self._group is not None
        others = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=rank)
        options = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "resources": others or None,
            "scheduling_strategy": strategy,
            # `run` takes one, questions the other.
            "max_concurrency": 2,
            **(self._plan.actor_options or {}),
        }
        return ray.remote(RankActor).options(**options).remote()

    def _describe_unplaced(self) -> str:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        names = sorted({name for bundle in self._plan.bundles for name in bundle})
        has = ["{" + ", ".join(f"{name}: {node['Resources'].get(name, 0):g}" for name in names) + "}" for node in nodes]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        left = ", ".join(f"{name}: {free.get(name, 0):g}" for name in names)
        return (
            f"{len(self._plan.bundles)} ranks found no place in {self._plan.placement_timeout_s:g} s: they ask for "
            f"{[dict(bundle) for bundle in self._plan.bundles]} by {self._plan.strategy}, the cluster's {len(nodes)} "
            f"nodes have {', '.join(has)}, of which {left} is free: choose smaller tensor_parallel_size, "
            "pipeline_parallel_size or concurrency, another strategy, or raise placement_timeout_s where nodes are "
            "added on demand"
        )
