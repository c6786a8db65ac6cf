"""What Ray Data is told about our operators."""

from __future__ import annotations

from typing import Any

import pytest

from raydata_llm import ChatTemplateStageConfig, EngineProcessorConfig, TokenizerStageConfig
from raydata_llm.ray_operators import pool_options, task_options
from raydata_llm.replica_pool import Cluster, ReplicaPool


def config(**fields: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(model_source="m", **fields)


def options_of_pool(num_gpus: float, **fields: Any) -> dict[str, Any]:
    pool = ReplicaPool.plan(config(**fields), Cluster(num_gpus=num_gpus, node_cpus=[4]))
    return pool_options(pool, config(**fields))


def test_replicas_leave_the_cpus_to_the_tasks_that_feed_them() -> None:
    options = options_of_pool(0, concurrency=2)
    assert options["num_cpus"] == 0 and "num_gpus" not in options and "accelerator_type" not in options
    assert (options["compute"].min_size, options["compute"].max_size) == (2, 2)
    assert options["compute"].enable_true_multi_threading


def test_a_replica_takes_one_gpu_of_the_kind_asked_for() -> None:
    options = options_of_pool(8, accelerator_type="H100", concurrency=(1, 4))
    assert (options["num_cpus"], options["num_gpus"], options["accelerator_type"]) == (0, 1, "H100")
    assert (options["compute"].min_size, options["compute"].max_size) == (1, 4)


def test_a_block_that_takes_its_replica_down_is_not_retried_for_ever() -> None:
    assert 0 < options_of_pool(0)["max_task_retries"] < 10


@pytest.mark.parametrize(
    ("map_kwargs", "expected"),
    [
        (None, {"num_cpus": 2, "memory": 1e9, "runtime_env": {"env_vars": {"A": "1"}}}),
        ({"num_cpus": 0.5, "concurrency": 3, "fn_args": (1,)}, {"num_cpus": 0.5, "concurrency": 3}),
        ({"runtime_env": {"pip": []}}, {"runtime_env": {"pip": []}}),
    ],
    ids=str,
)
def test_the_users_options_of_a_function_come_before_the_stages_and_the_processors(
    map_kwargs: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    stages = [ChatTemplateStageConfig(num_cpus=2), TokenizerStageConfig(memory=1e9)]
    options = task_options("preprocess_map_kwargs", map_kwargs, stages, config(runtime_env={"env_vars": {"A": "1"}}))
    assert options == {"num_cpus": 2, "memory": 1e9, "runtime_env": {"env_vars": {"A": "1"}}} | expected
