"""How many replicas, on what, and how much work each holds: worked out from the config and the cluster as it is.

Owns the sizes (rows of a block, blocks in flight, CPU threads) and the choice between GPU and CPU. Runs on the driver;
knows no rows and no engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydata_llm.config import EngineProcessorConfig
from raydata_llm.redaction import masked_logger

logger = masked_logger(__name__)

# EngineConfig's own defaults of max_num_seqs: how deep the queue is decided before the engines tell theirs.
_SLOTS_ON_GPU, _SLOTS_ON_CPU = 1024, 64
# Rows of a block go to all replicas, so its size does not bear on how they share the work; but each costs four tasks,
# at which two cores spend a quarter of a second: blocks of 64 rows fed 256 rows a second. A block comes out when its
# last row is done, so a slow engine's are small.
_LEAST_BLOCK_ROWS, _MOST_BLOCK_ROWS = 256, 1024
# Rows in flight. Costly rows can only go first if they are there, and a block keeps its place until its last row is
# done: where one row in 16 is 20 times longer, full slots take 10 times their number of rows. With 256 slots 1024 in
# flight took 18 s for 4096 rows and all of them 14; with 1024 slots 4096 in flight kept 45 % of them, 16,384 all.
_QUEUE_ROWS, _QUEUE_PER_SLOT = 4096, 16
# Each block at work is a thread of the dispatcher; a larger pool gets larger blocks.
_MOST_BLOCKS = 256


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the driver sees of the cluster.

    Args:
        num_gpus: All GPUs.
        node_cpus: CPUs of each node that has some.
    """

    num_gpus: float
    node_cpus: Sequence[float]

    @property
    def num_cpus(self) -> float:
        """All CPUs."""
        return sum(self.node_cpus)

    @classmethod
    def current(cls) -> Cluster:
        """The cluster that Ray is connected to (it is started if there is none)."""
        import ray

        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        cpus = [node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"]]
        return cls(num_gpus=resources.get("GPU", 0.0), node_cpus=[count for count in cpus if count > 0])


@dataclass(frozen=True, kw_only=True)
class ReplicaPool:
    """The sizes of a pool.

    Args:
        min_size, max_size: Replicas.
        use_gpu: Whether each takes a GPU.
        block_rows: Rows of a block.
        blocks_in_flight: Blocks at work at once, for all replicas together.
        engine_kwargs: The user's, with what the placement decides.
    """

    min_size: int
    max_size: int
    use_gpu: bool
    block_rows: int
    blocks_in_flight: int
    engine_kwargs: Mapping[str, Any]

    @classmethod
    def plan(cls, config: EngineProcessorConfig, cluster: Cluster) -> ReplicaPool:
        """Work out the pool for a cluster."""
        use_gpu = _uses_gpu(config, cluster)
        min_size, max_size = config.pool_bounds
        slots = _slots(config, use_gpu)
        queue = max(_QUEUE_ROWS, _QUEUE_PER_SLOT * slots * max_size)
        usual = min(max(slots, _LEAST_BLOCK_ROWS), _MOST_BLOCK_ROWS)
        block_rows = config.batch_size or max(usual, math.ceil(queue / _MOST_BLOCKS))
        asked = config.max_tasks_in_flight_per_actor or config.max_concurrent_batches
        return cls(
            min_size=min_size,
            max_size=max_size,
            use_gpu=use_gpu,
            block_rows=block_rows,
            blocks_in_flight=min(asked * max_size if asked else math.ceil(queue / block_rows), _MOST_BLOCKS),
            engine_kwargs=_placed(config.engine_settings, use_gpu, max_size, cluster),
        )


def _uses_gpu(config: EngineProcessorConfig, cluster: Cluster) -> bool:
    device = str(config.engine_kwargs.get("device") or "auto").partition(":")[0]
    if device != "auto":
        use_gpu, reason = device == "cuda", f"engine_kwargs['device']={device!r}"
    elif config.accelerator_type is not None:
        use_gpu, reason = True, f"accelerator_type={config.accelerator_type!r}"
    else:
        use_gpu, reason = cluster.num_gpus > 0, f"the cluster has {cluster.num_gpus:g} GPUs"
    ranks = config.engine_config().num_ranks
    asked = config.pool_bounds[0] * ranks
    logger.info("Replicas run on %s: %s", "one GPU each" if use_gpu else "CPUs", reason)
    if use_gpu and cluster.num_gpus < asked:
        logger.warning(
            "concurrency=%s asks for %d GPUs and the cluster has %g: the missing replicas wait for more nodes",
            config.concurrency,
            asked,
            cluster.num_gpus,
        )
    return use_gpu


def _slots(config: EngineProcessorConfig, use_gpu: bool) -> int:
    asked: int | None = config.engine_kwargs.get("max_num_seqs")
    return asked or (_SLOTS_ON_GPU if use_gpu else _SLOTS_ON_CPU)


def _placed(engine_kwargs: Mapping[str, Any], use_gpu: bool, replicas: int, cluster: Cluster) -> dict[str, Any]:
    placed = dict(engine_kwargs)
    if placed.get("device") in (None, "auto"):
        placed["device"] = "cuda" if use_gpu else "cpu"
    if not use_gpu and placed.get("num_threads") is None:
        # Ray sets OMP_NUM_THREADS to 1 in an actor that takes no CPUs, so the engine must be told.
        ranks = int(placed.get("tensor_parallel_size") or 1) * int(placed.get("pipeline_parallel_size") or 1)
        per_node = math.ceil(replicas * ranks / max(1, len(cluster.node_cpus)))
        placed["num_threads"] = max(1, int(min(cluster.node_cpus, default=1)) // per_node)
    return placed
