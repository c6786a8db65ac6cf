"""Where ranks come to be: what cannot be placed is one error with the numbers, in time, and GPUs are shown by host."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydata_llm import EngineProcessorConfig
from raydata_llm.cluster.gang import Gang, GangPlan, RankPlacement, node_gpus
from raydata_llm.replica_gang import engine_factory
from raydata_llm.replica_pool import Cluster as ClusterView
from raydata_llm.replica_pool import ReplicaPool
from tests.raydata_llm.patience import wait_until

TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head, and a node with two GPUs in name."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    marks = {"rank": 2, "accelerator_type:H100": 1}
    cluster.add_node(num_cpus=2, num_gpus=2, resources=marks, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


def serve_nothing(address: Any, rank: int, gpu: int) -> None:
    """A rank's part: there is nothing to do."""


def placing(bundle: dict[str, float], count: int, strategy: str = "PACK") -> Gang:
    plan = GangPlan(bundles=[bundle] * count, strategy=strategy, placement_timeout_s=TIMEOUT_S)
    return Gang(plan, serve_nothing)


@pytest.mark.parametrize(
    ("bundle", "count", "strategy", "error"),
    [
        ({"GPU": 1.0}, 3, "PACK", "3 ranks found no place in 3 s.*'GPU': 1.0.*by PACK.*GPU: 2.*GPU: 2 is free"),
        ({"GPU": 1.0}, 2, "STRICT_SPREAD", "2 ranks found no place in 3 s.*STRICT_SPREAD.*GPU: 2 is free"),
        ({"rank": 1.0}, 4, "STRICT_PACK", "4 ranks found no place in 3 s.*'rank': 1.0.*rank: 2"),
        ({"nonesuch": 1.0}, 1, "PACK", "1 ranks found no place in 3 s.*'nonesuch': 1.0.*nonesuch: 0 is free"),
        ({"CPU": 64.0}, 2, "SPREAD", "2 ranks found no place in 3 s.*'CPU': 64.0.*CPU: 3 is free"),
    ],
    ids=["more ranks than GPUs", "a node each", "one node for all", "what no node has", "more CPUs than a node has"],
)
def test_ranks_that_cannot_be_placed_are_an_error_with_the_numbers_in_time(
    cluster: Cluster, bundle: dict[str, float], count: int, strategy: str, error: str
) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=error):
        placing(bundle, count, strategy).launch(("nowhere", 0), count)
    assert time.monotonic() - began < TIMEOUT_S + 30
    assert_all_is_free()


@pytest.mark.parametrize(("accelerator_type", "bundle"), [("H100", None), ("L4", None), ("L4", {"rank": 1})], ids=str)
def test_ranks_are_placed_on_the_gpus_that_are_asked_for(
    cluster: Cluster, accelerator_type: str, bundle: dict[str, float] | None
) -> None:
    config = EngineProcessorConfig(
        model_source="m",
        engine_kwargs={"tensor_parallel_size": 2},
        accelerator_type=accelerator_type,
        resources_per_bundle=bundle,
        placement_timeout_s=TIMEOUT_S,
    )
    factory: Any = engine_factory(config, ReplicaPool.plan(config, ClusterView.current()))
    gang = Gang(factory.args[0], serve_nothing)
    if accelerator_type == "L4" and bundle is None:
        with pytest.raises(ValueError, match=r"found no place in 3 s.*'accelerator_type:L4'.*accelerator_type:L4: 0"):
            gang.launch(("nowhere", 0), 2)
    else:
        for handle in gang.launch(("nowhere", 0), 2):
            handle.end()
    assert_all_is_free()


def test_a_node_that_vanishes_while_ranks_are_placed_is_an_error_with_the_numbers(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=0, resources={"late": 1}, object_store_memory=100 << 20)
    removal = threading.Timer(1.0, lambda: cluster.remove_node(node, allow_graceful=False))
    began = time.monotonic()
    removal.start()
    with pytest.raises(ValueError, match=r"2 ranks found no place in 3 s.*'late': 1\.0"):
        placing({"late": 1.0}, 2).launch(("nowhere", 0), 2)
    assert time.monotonic() - began < TIMEOUT_S + 30
    removal.join()


def test_a_node_that_vanishes_with_its_ranks_is_told_by_their_fate(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=0, resources={"doomed": 2}, object_store_memory=100 << 20)
    plan = GangPlan(bundles=[{"doomed": 1.0}] * 2, placement_timeout_s=20)
    handles = Gang(plan, serve_for_long).launch(("nowhere", 0), 2)
    assert [handle.fate() for handle in handles] == [None, None]
    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: all(handle.fate() for handle in handles))
    assert all("process" in str(handle.fate()) for handle in handles)
    for handle in handles:
        handle.end()


def serve_for_long(address: Any, rank: int, gpu: int) -> None:
    """A rank that goes on."""
    time.sleep(600)


@ray.remote(num_cpus=0)
class Notes:
    """What ranks saw."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, str]] = {}

    def note(self, rank: int, gpu: int, visible: str) -> None:
        """Take a rank's word."""
        self._seen[rank] = (gpu, visible)

    def seen(self) -> dict[int, tuple[int, str]]:
        """Of all."""
        return self._seen


def test_ranks_of_a_host_see_each_others_gpus_and_have_one_each(cluster: Cluster) -> None:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # A node taken away by the tests above may still count as alive: notes that land there are lost.
    notes: Any = Notes.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def serve(address: Any, rank: int, gpu: int) -> None:
        ray.get(notes.note.remote(rank, gpu, os.environ["CUDA_VISIBLE_DEVICES"]))

    plan = GangPlan(bundles=[{"GPU": 1.0}] * 2, placement_timeout_s=20)
    handles = Gang(plan, serve).launch(("nowhere", 0), 2)
    wait_until(lambda: all(handle.fate() for handle in handles))
    fates = [str(handle.fate()) for handle in handles]
    assert all("it returned" in fate for fate in fates), fates
    seen = ray.get(notes.seen.remote())
    assert sorted(seen) == [0, 1]
    visible = {one[1] for one in seen.values()}
    assert len(visible) == 1 and sorted(visible.pop().split(",")) == ["0", "1"]
    assert sorted(one[0] for one in seen.values()) == [0, 1]
    for handle in handles:
        handle.end()
    assert_all_is_free()


@pytest.mark.parametrize(
    ("gpus", "shown"),
    [
        ([("0",), ("1",), ("0",)], ["0", "1"]),
        ([("3",), ("3",), ("3",)], ["3"]),
        ([(), (), ()], []),
        ([("0", "1"), ("2", "3"), ("0",)], []),
    ],
    ids=["one each", "shares of one", "none", "several each"],
)
def test_gpus_of_a_nodes_ranks(gpus: list[tuple[str, ...]], shown: list[str]) -> None:
    nodes = ("here", "here", "there")
    places = [RankPlacement(host="h", pid=1, node=node, gpus=own) for node, own in zip(nodes, gpus, strict=True)]
    assert node_gpus(places, "here") == shown


def assert_all_is_free() -> None:
    free = wait_until(lambda: ray.available_resources().get("GPU") == 2)  # type: ignore[no-untyped-call]
    assert free, f"still taken: {ray.available_resources()}"  # type: ignore[no-untyped-call]
