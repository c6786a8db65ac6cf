"""What Ray Data is told about our operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from raydata_llm import ChatTemplateStageConfig, EngineProcessorConfig, TokenizerStageConfig
from raydata_llm.ray_operators import cpus_of_tasks, regroup, replica_options, task_options, tell_of_waiting_tasks
from raydata_llm.replica_pool import Cluster, ReplicaPool
from tests.raydata_llm.processor_fakes import ray_session


def config(**fields: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(model_source="m", **fields)


def planned(num_gpus: float, **fields: Any) -> ReplicaPool:
    return ReplicaPool.plan(config(**fields), Cluster(num_gpus=num_gpus, node_cpus=[4]))


def test_replicas_leave_the_cpus_to_the_tasks_that_feed_them() -> None:
    assert replica_options(planned(0, concurrency=2), config(concurrency=2)) == {"num_cpus": 0}


def test_a_replica_takes_one_gpu_of_the_kind_asked_for() -> None:
    fields: dict[str, Any] = {"accelerator_type": "H100", "concurrency": (1, 4), "runtime_env": {"pip": []}}
    options = replica_options(planned(8, **fields), config(**fields))
    assert options == {"num_cpus": 0, "num_gpus": 1, "accelerator_type": "H100", "runtime_env": {"pip": []}}


def test_the_users_resources_are_what_a_replica_reserves() -> None:
    fields: dict[str, Any] = {"resources_per_bundle": {"GPU": 1, "CPU": 2, "memory": 1e9, "spot": 0.5}}
    options = replica_options(planned(8, **fields), config(**fields))
    assert options == {"num_cpus": 2, "num_gpus": 1, "memory": 1e9, "resources": {"spot": 0.5}}


@pytest.mark.parametrize(
    ("map_kwargs", "expected"),
    [
        (None, {"num_cpus": 2, "memory": 1e9, "runtime_env": {"env_vars": {"A": "1"}}}),
        ({"num_cpus": 0.5, "concurrency": 3, "fn_args": (1,)}, {"num_cpus": 0.5, "concurrency": 3}),
        ({"runtime_env": {"pip": []}}, {"runtime_env": {"pip": []}}),
        ({"max_retries": 1}, {"max_retries": 1}),
    ],
    ids=str,
)
def test_the_users_options_of_a_function_come_before_the_stages_and_the_processors(
    map_kwargs: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    stages = [ChatTemplateStageConfig(num_cpus=2), TokenizerStageConfig(memory=1e9)]
    options = task_options("preprocess_map_kwargs", map_kwargs, stages, config(runtime_env={"env_vars": {"A": "1"}}))
    own = {"num_cpus": 2, "memory": 1e9, "max_retries": 8, "runtime_env": {"env_vars": {"A": "1"}}}
    assert options == own | expected


def test_tasks_that_no_node_can_run_are_told(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(num_gpus=0, node_cpus=[2, 8])
    tell_of_waiting_tasks("preprocess", {"num_cpus": 8}, cluster)
    tell_of_waiting_tasks("preprocess", {}, cluster)
    assert not caplog.records
    tell_of_waiting_tasks("postprocess", {"num_cpus": 64}, cluster)
    assert "postprocess's tasks ask for num_cpus=64 and the largest node has 8" in caplog.text


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize(("cpus", "of_putting_together", "at_once"), [(2, 0, 1), (16, 0.01, 4)])
def test_putting_rows_together_takes_no_cpu_that_others_need(
    cpus: float, of_putting_together: float, at_once: int
) -> None:
    operator: Any = regroup(ray.data.range(10), 4, Cluster(num_gpus=0, node_cpus=[cpus]))._logical_plan.dag
    assert operator.ray_remote_args == {"num_cpus": of_putting_together} and operator.compute.size == at_once


@pytest.mark.usefixtures("session")
def test_on_few_cpus_postprocess_has_one_to_itself_where_reading_may_take_long() -> None:
    few, many = Cluster(num_gpus=0, node_cpus=[2]), Cluster(num_gpus=0, node_cpus=[4, 8])
    soon, long = ray.data.range(1000, override_num_blocks=8), ray.data.range(1000, override_num_blocks=500)
    mapped = soon.map(lambda row: row)
    assert cpus_of_tasks(soon, few) == cpus_of_tasks(long, many) == {}
    assert cpus_of_tasks(long, few) == cpus_of_tasks(mapped, few) == {"num_cpus": 0.5}
