"""How Ray Data runs our operators: the options of their tasks and of the pool, for the versions of Ray we work with.

Owns every name of Ray Data's that the processor depends on, so that a new version of Ray is a matter of this file.
Nothing here changes a DataContext. Imports Ray only inside functions, which a driver calls with a dataset in hand.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydata_llm.config import EngineProcessorConfig
from raydata_llm.engine.known_names import nearest
from raydata_llm.engine.regular_file import shown
from raydata_llm.redaction import hide_environment, masked_logger
from raydata_llm.redaction import shown as shown_setting
from raydata_llm.replica_pool import Cluster, ReplicaPool
from raydata_llm.stage_config import StageConfig

if TYPE_CHECKING:
    from ray.data import Dataset

logger = masked_logger(__name__)

# Times a block is sent again when the dispatcher's process or node is lost (replicas are its own business).
_BLOCK_RETRIES = 4

# Times a task of the user's functions is sent again when its process or node is lost. Ray Data does so for ever, also
# with a row that crashes the process; losses of nodes hit a task of seconds rarely more than once.
_TASK_RETRIES = 8

# From so many on, each of the operators that take CPUs has one.
_CPUS_FOR_ALL = 4
# What a CPU reads in two seconds or so.
_FEW_BLOCKS, _FEW_BYTES = 64, 64 << 20

# Arguments of the user's function, bound to it elsewhere.
_BINDABLE = ("fn_args", "fn_kwargs")
_TASK_OPTIONS = (
    "accelerator_type",
    "concurrency",
    "fallback_strategy",
    "label_selector",
    "max_calls",
    "max_retries",
    "memory",
    "num_cpus",
    "num_gpus",
    "resources",
    "retry_exceptions",
    "runtime_env",
    "scheduling_strategy",
)
# Whether it is a whole number, the smallest and the largest.
_MOST_OF: Mapping[str, tuple[bool, int, int]] = {
    "concurrency": (True, 1, 1_000_000),
    "max_calls": (True, 0, 1_000_000_000),
    "max_retries": (True, -1, 1_000_000_000),
    "memory": (False, 0, 2**60),
    "num_cpus": (False, 0, 1_000_000),
    "num_gpus": (False, 0, 1_000_000),
}


def task_options(
    name: str,
    map_kwargs: Mapping[str, Any] | None,
    stages: Sequence[StageConfig],
    config: EngineProcessorConfig,
) -> dict[str, Any]:
    """Options of one operator's tasks: the processor's, then its stages', then the user's for the function."""
    options: dict[str, Any] = {"runtime_env": config.runtime_env, "max_retries": _TASK_RETRIES}
    for stage in stages:
        for option in ("num_cpus", "memory", "concurrency", "runtime_env"):
            if getattr(stage, option) is not None:
                options[option] = getattr(stage, option)
    for option, value in (map_kwargs or {}).items():
        if option not in _TASK_OPTIONS and option not in _BINDABLE:
            hint = nearest(option, (*_TASK_OPTIONS, *_BINDABLE))
            raise ValueError(f"{name}[{option!r}]={shown_setting(option, value)} is not valid: {hint}")
        if option in _TASK_OPTIONS:
            _check_number(name, option, value)
            options[option] = value
    return _given(options)


def _check_number(name: str, option: str, value: Any) -> None:
    """Refuse amounts that Ray would take without a word, and wait for ever."""
    if option not in _MOST_OF or value is None or (option == "concurrency" and isinstance(value, tuple)):
        return
    whole, low, most = _MOST_OF[option]
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= most:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name}[{option!r}]={shown(value)} is not valid: give a {kind} from {low} to {most}")


def tell_of_waiting_tasks(function: str, options: Mapping[str, Any], cluster: Cluster) -> None:
    """Warn of tasks that no node of the cluster can run: Ray says nothing, and waits for one that can."""
    asked, most = options.get("num_cpus"), max(cluster.node_cpus, default=0)
    if asked is not None and asked > most:
        logger.warning(
            "%s's tasks ask for num_cpus=%g and the largest node has %g: no row is read until a larger one joins",
            function,
            asked,
            most,
        )


def replica_options(pool: ReplicaPool, config: EngineProcessorConfig) -> dict[str, Any]:
    """Options of each replica's actor."""
    # Ray would give an actor a CPU of its own otherwise, and two replicas on two CPUs leave none for the tasks that
    # feed them: no row, no message.
    asked = dict(config.replica_resources or {})
    options: dict[str, Any] = {
        "num_cpus": asked.pop("CPU", 0),
        "memory": asked.pop("memory", None),
        "runtime_env": config.runtime_env,
    }
    if config.engine_config().num_ranks > 1:
        # The ranks take what is asked for; the replica steers them.
        return _given({"num_cpus": 0, "runtime_env": config.runtime_env})
    num_gpus = asked.pop("GPU", 1 if pool.use_gpu else 0)
    if num_gpus:
        options |= {"num_gpus": num_gpus, "accelerator_type": config.accelerator_type}
    return _given({**options, "resources": asked or None})


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {option: value for option, value in options.items() if value is not None}
    if isinstance(given.get("runtime_env"), Mapping):
        # Ray Data writes its operators' options into its log, credentials in them included.
        given["runtime_env"] = hide_environment(given["runtime_env"])
    return given


def dispatcher_options(pool: ReplicaPool, config: EngineProcessorConfig) -> dict[str, Any]:
    """Options of the one actor that starts the replicas and feeds them."""
    from ray.data import ActorPoolStrategy

    strategy: dict[str, Any] = {
        "size": 1,
        "max_tasks_in_flight_per_actor": pool.blocks_in_flight,
        "enable_true_multi_threading": True,
    }
    options = _given(
        {
            "num_cpus": 0,
            "max_task_retries": _BLOCK_RETRIES,
            "scheduling_strategy": _this_node(),
            "runtime_env": config.runtime_env,
        }
    )
    if "max_concurrent_calls_per_actor" not in inspect.signature(ActorPoolStrategy).parameters:  # before Ray 2.58
        return {"compute": ActorPoolStrategy(**strategy), "max_concurrency": pool.blocks_in_flight, **options}
    return {"compute": ActorPoolStrategy(**strategy, max_concurrent_calls_per_actor=pool.blocks_in_flight), **options}


def _this_node() -> Any:
    """The driver's node: as long as that lives, losing a node costs no more than the rows of its replicas."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Softly, a node that has just joined and knows no other yet would keep what it is asked to place.
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def with_own_context(dataset: Dataset, *, preserve_order: bool) -> Dataset:
    """The same dataset with settings that hold for it and what is made from it alone."""
    own: Dataset = type(dataset).copy(dataset, _deep_copy=True)
    if preserve_order:
        own.context.execution_options.preserve_order = True
    # Ray Data stops a job in which no block comes out for half an hour, as happens where rows are long; an engine that
    # hangs is noticed by our own clock.
    if hasattr(own.context, "execution_no_progress_timeout_s"):
        own.context.execution_no_progress_timeout_s = -1
    return own


def regroup(dataset: Dataset, block_rows: int, cluster: Cluster) -> Dataset:
    """Blocks of exactly so many rows each, but for the last."""
    from ray.data import TaskPoolStrategy

    regrouped = dataset.repartition(target_num_rows_per_block=block_rows, strict=True)
    operator = regrouped._logical_plan.dag
    # Ray Data keeps a CPU for reading and one for this as long as they have anything to do: with two CPUs in all, no
    # row would be prepared before all are read. Tasks that put rows together do with next to none (not with none where
    # there are enough: nodes without CPUs are to be left alone); few at a time, or Ray would start a process for each.
    if hasattr(operator, "ray_remote_args") and hasattr(operator, "compute"):
        few = TaskPoolStrategy(size=max(1, int(cluster.num_cpus) // 4))
        num_cpus = 0.01 if cluster.num_cpus >= _CPUS_FOR_ALL else 0
        object.__setattr__(operator, "ray_remote_args", {"num_cpus": num_cpus})
        object.__setattr__(operator, "compute", few)
    return regrouped


def cpus_of_tasks(dataset: Dataset, cluster: Cluster) -> dict[str, Any]:
    """What a task of `preprocess` or `postprocess` takes where nobody asked for more or less."""
    # With fewer CPUs than operators `postprocess` would get one when all is read, which may take hours; answers wait.
    # Tasks of half a CPU are more processes to start, half a second in all: not worth it where reading ends at once.
    if cluster.num_cpus >= _CPUS_FOR_ALL or _is_read_at_once(dataset):
        return {}
    return {"num_cpus": 0.5}


def _is_read_at_once(dataset: Dataset) -> bool:
    """Whether Ray Data knows, without reading, of few blocks with little in them."""
    operator = dataset._logical_plan.dag
    if operator.input_dependencies or not hasattr(operator, "infer_metadata"):
        return False
    num_blocks, size = operator.estimated_num_outputs(), operator.infer_metadata().size_bytes
    return num_blocks is not None and size is not None and num_blocks <= _FEW_BLOCKS and size <= _FEW_BYTES


def map_blocks(dataset: Dataset, function: Any, block_rows: int, **options: Any) -> Dataset:
    """Run a function of a whole block, as an Arrow table, over a dataset."""
    from ray.data import TaskPoolStrategy

    concurrency = options.pop("concurrency", None)
    if concurrency is not None:
        options["compute"] = TaskPoolStrategy(size=max(concurrency) if isinstance(concurrency, tuple) else concurrency)
    options |= {"batch_format": "pyarrow", "zero_copy_batch": True, "udf_modifying_row_count": False}
    if hasattr(dataset, "map_batches_internal"):
        return dataset.map_batches_internal(function, batch_size=None, **options)
    # Older Rays have the public method alone, which asks for a batch size where a GPU is taken.
    return dataset.map_batches(function, batch_size=block_rows if options.get("num_gpus") else None, **options)


def dispatchers(execution: Any) -> list[Any]:
    """The actors of our second operator in an execution under way; none in a version of Ray that hides them.

    Args:
        execution: Ray Data's, as its callbacks are handed it.
    """
    actors: list[Any] = []
    for operator in execution._topology:
        if "(Dispatcher)" in operator.name:
            pool = getattr(operator, "_actor_pool", None)
            actors += getattr(pool, "_running_actors", {})
            actors += getattr(pool, "_pending_actors", {}).values()
    return actors


def starting(actors: Sequence[Any]) -> dict[Any, bool]:
    """The actors that have no process yet that serves calls; whether each had one and lost it.

    Args:
        actors: Handles that a call was made through, so that this process is told their states.
    """
    from ray.core.generated import gcs_pb2

    state_of: Any = gcs_pb2  # generated, without types
    state_of = state_of.ActorTableData
    states = {actor: actor._get_local_state() for actor in actors}
    pending = (state_of.DEPENDENCIES_UNREADY, state_of.PENDING_CREATION, state_of.RESTARTING)
    return {actor: state == state_of.RESTARTING for actor, state in states.items() if state in pending}


def claim_priority(actor: Any) -> None:
    """Give an actor's process on this machine the priority of this process, where the system allows that.

    Ray starts its processes at nice 15. On a machine that others keep busy, a new dispatcher's imports (two seconds of
    CPU) take minutes, in which the whole job waits. Raising a priority needs root's rights.
    """
    from ray._private.state import actors as actor_table

    pid = int(actor_table(actor._actor_id.hex()).get("Pid") or 0)
    try:
        if pid and b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            for thread in os.listdir(f"/proc/{pid}/task"):  # each has a priority of its own
                os.setpriority(os.PRIO_PROCESS, int(thread), os.getpriority(os.PRIO_PROCESS, 0))
    except OSError:  # it has ended, we may not, or this is no Linux: it starts as slowly as Ray has it
        return
