"""Nodes that vanish with the replicas on them, in a cluster of several raylets on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.raydata_llm.faulty_engine import check_rows, faulty_processor, nodes_of_replicas, with_ids
from tests.raydata_llm.patience import PATIENCE
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

ROWS = 1500
# Ray notices a dead node after 15 s otherwise. A dead one refuses at once; one that is slow to answer on a loaded
# machine must not be taken for dead, so the time to answer stays long.
_QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 30_000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 200 << 20, "_system_config": _QUICK},
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    ray.init(address=cluster.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


def test_a_lost_node_costs_only_the_rows_that_were_on_it(cluster: Cluster, tmp_path: Path) -> None:
    model = str(save_tokenizer(tmp_path))
    spots = [cluster.add_node(num_cpus=0, resources={"spot": 1}, object_store_memory=100 << 20) for _ in range(2)]
    processor = faulty_processor(model, "", tmp_path, concurrency=2, resources_per_bundle={"spot": 1})
    rows: list[dict[str, Any]] = []
    flowing = threading.Event()

    def consume() -> None:
        for row in processor(with_ids(ROWS, 10)).iter_rows():
            rows.append(row)
            flowing.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert flowing.wait(PATIENCE)
    # One that works: the other may still be on its way.
    lost = next(spot for spot in spots if spot.node_id in nodes_of_replicas())
    seen = len(rows)
    cluster.remove_node(lost, allow_graceful=False)  # in the main thread, as Ray asks
    consumer.join(timeout=PATIENCE)
    assert not consumer.is_alive() and seen < ROWS
    check_rows(rows, ROWS)
    report = processor.report()
    assert (report.status, report.rows, report.gap) == ("finished", ROWS, None), "what watches the job was elsewhere"
