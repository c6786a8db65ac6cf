"""How many replicas, on what, and how much work each holds."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from raydata_llm import EngineProcessorConfig
from raydata_llm.replica_pool import Cluster, ReplicaPool

LAPTOP = Cluster(num_gpus=0, node_cpus=[8])
GPUS = Cluster(num_gpus=8, node_cpus=[64, 64])


def plan(cluster: Cluster, **fields: Any) -> ReplicaPool:
    return ReplicaPool.plan(EngineProcessorConfig(model_source="m", **fields), cluster)


@pytest.mark.parametrize(
    ("cluster", "fields", "use_gpu"),
    [
        (LAPTOP, {}, False),
        (GPUS, {}, True),
        (GPUS, {"engine_kwargs": {"device": "cpu"}}, False),
        (LAPTOP, {"engine_kwargs": {"device": "cuda"}}, True),
        (LAPTOP, {"accelerator_type": "L4"}, True),
        (GPUS, {"accelerator_type": "L4", "engine_kwargs": {"device": "cpu"}}, False),
    ],
    ids=str,
)
def test_the_device_is_what_was_asked_for_or_what_the_cluster_has(
    cluster: Cluster, fields: dict[str, Any], use_gpu: bool
) -> None:
    pool = plan(cluster, **fields)
    assert pool.use_gpu is use_gpu
    assert pool.engine_kwargs["device"] == ("cuda" if use_gpu else "cpu")
    assert ("num_threads" in pool.engine_kwargs) is not use_gpu


def test_replicas_on_cpus_share_their_nodes_cores() -> None:
    assert plan(LAPTOP).engine_kwargs["num_threads"] == 8
    assert plan(LAPTOP, concurrency=3).engine_kwargs["num_threads"] == 2
    assert plan(LAPTOP, concurrency=20).engine_kwargs["num_threads"] == 1
    two_nodes = Cluster(num_gpus=0, node_cpus=[16, 4])
    assert plan(two_nodes, concurrency=(1, 4)).engine_kwargs["num_threads"] == 2
    assert plan(LAPTOP, engine_kwargs={"num_threads": 5}).engine_kwargs["num_threads"] == 5


@pytest.mark.parametrize("cluster", [LAPTOP, GPUS], ids=["cpu", "gpu"])
@pytest.mark.parametrize("batch_size", [None, 16, 2000])
@pytest.mark.parametrize("concurrency", [1, 8, (1, 64)])
def test_more_rows_are_in_flight_than_engines_run(cluster: Cluster, batch_size: int | None, concurrency: Any) -> None:
    pool = plan(cluster, batch_size=batch_size, concurrency=concurrency)
    slots = (1024 if pool.use_gpu else 64) * pool.max_size
    assert pool.blocks_in_flight <= 256, "each is a thread"
    in_flight = pool.blocks_in_flight * pool.block_rows
    if batch_size is not None and in_flight < 16 * slots:
        assert pool.blocks_in_flight == 256
    else:
        assert max(4096, 16 * slots) <= in_flight <= max(4096, 16 * slots) + pool.block_rows


def test_the_users_limits_count() -> None:
    assert plan(GPUS, max_concurrent_batches=3, concurrency=2).blocks_in_flight == 6
    assert plan(GPUS, max_concurrent_batches=3, max_tasks_in_flight_per_actor=5).blocks_in_flight == 5


def test_gpus_that_are_not_there_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plan(GPUS, concurrency=16)
    assert "concurrency=16 asks for 16 GPUs and the cluster has 8" in caplog.text
