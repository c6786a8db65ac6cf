"""Replicas of several ranks on Ray: over nodes that are raylets of this machine, with GPUs in name only."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from raydata_llm.config import vLLMEngineProcessorConfig
from raydata_llm.processor import Processor
from tests.raydata_llm.patience import PATIENCE, wait_until
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

ROWS = 60
ENGINE: dict[str, Any] = {"device": "cpu", "max_num_seqs": 16, "max_model_len": 128, "num_threads": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 200 << 20})
    for _ in range(2):
        cluster.add_node(num_cpus=0, resources={"rank": 2}, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


def processor(
    model: str, strategy: str, concurrency: int = 1, placement_timeout_s: float = 20, **engine: Any
) -> Processor:
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={**ENGINE, **engine},
        concurrency=concurrency,
        batch_size=8,
        placement_group_config={"bundle_per_worker": {"rank": 1}, "strategy": strategy},
        placement_timeout_s=placement_timeout_s,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        token_ids = [3 + row["id"], 5, 9, 300]
        params = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True, "detokenize": False}
        return {"id": row["id"], "tokenized_prompt": token_ids, "sampling_params": params}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "tokens": list(row["generated_tokens"])}

    return Processor(config, ask, answer)


def answers(asked: Processor) -> dict[int, list[int]]:
    rows = asked(ray.data.range(ROWS, override_num_blocks=8)).take_all()
    assert Counter(row["id"] for row in rows) == Counter(range(ROWS))
    return {row["id"]: list(row["tokens"]) for row in rows}


def rank_actors(*states: str) -> list[dict[str, Any]]:
    """The ranks that live, or are in one of these states."""
    from ray._private.state import actors

    known = actors().values()
    wanted = states or ("ALIVE",)
    return [actor for actor in known if actor["ActorClassName"] == "RankActor" and actor["State"] in wanted]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_model("llama", num_attention_heads=8), folder, dirs_exist_ok=True)
    # Which asks for a config of its own to write.
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(cluster: Cluster, model: str) -> dict[int, list[int]]:
    return answers(processor(model, "PACK"))


@pytest.mark.parametrize(
    ("strategy", "concurrency", "sizes"),
    [
        ("STRICT_SPREAD", 1, {"tensor_parallel_size": 2}),
        pytest.param("STRICT_SPREAD", 1, {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("STRICT_PACK", 2, {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["tp2 over two nodes", "pp2 over two nodes", "two replicas of tp2"],
)
def test_ranks_on_ray_write_what_one_rank_writes(
    model: str, expected: dict[int, list[int]], strategy: str, concurrency: int, sizes: dict[str, int]
) -> None:
    nodes: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            nodes.update(actor["Address"]["NodeID"] for actor in rank_actors())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        assert answers(processor(model, strategy, concurrency, **sizes)) == expected
    finally:
        done.set()
        watcher.join()
    assert len(nodes) == 2


LAYOUTS: dict[str, tuple[str, int, dict[str, int]]] = {
    "tp2 over two nodes": ("STRICT_SPREAD", 1, {"tensor_parallel_size": 2}),
    "pp2 over two nodes": ("STRICT_SPREAD", 1, {"pipeline_parallel_size": 2}),
    "two replicas of tp2": ("STRICT_PACK", 2, {"tensor_parallel_size": 2}),
}


def check_kill(model: str, expected: dict[int, list[int]], layout: str, seconds: float | None) -> None:
    """Kill one rank some time after all are there (None: when a first row is out); the rows must be whole."""
    strategy, concurrency, sizes = LAYOUTS[layout]
    found: list[tuple[int, list[int]]] = []
    flowing = threading.Event()
    before = {actor["ActorID"] for actor in rank_actors("ALIVE", "DEAD")}

    def ranks() -> list[dict[str, Any]]:
        return [actor for actor in rank_actors() if actor["ActorID"] not in before]

    asked = processor(model, strategy, concurrency, **sizes)

    def consume() -> None:
        for row in asked(ray.data.range(ROWS, override_num_blocks=8)).iter_rows():
            found.append((row["id"], list(row["tokens"])))
            flowing.set()

    job = threading.Thread(target=consume)
    job.start()
    assert wait_until(lambda: len(ranks()) == 2 * concurrency)
    if seconds is None:
        assert flowing.wait(PATIENCE)
    else:
        time.sleep(seconds)
    os.kill(random.choice(ranks())["Pid"], signal.SIGKILL)
    job.join(timeout=PATIENCE)
    assert not job.is_alive() and sorted(found) == sorted(expected.items())
    # Those of the first replicas, and those of the one that took a replica's place.
    seen = {actor["ActorID"] for actor in rank_actors("ALIVE", "DEAD")} - before
    assert len(seen) > 2 * concurrency


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(1.0, id="while it loads", marks=pytest.mark.slow), pytest.param(None, id="among the rows")],
)
def test_a_killed_rank_costs_no_row(model: str, expected: dict[int, list[int]], seconds: float | None) -> None:
    check_kill(model, expected, "tp2 over two nodes", seconds)


@pytest.mark.slow
@pytest.mark.parametrize("time_no", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_killed_at_random_cost_no_row(
    model: str, expected: dict[int, list[int]], layout: str, time_no: int
) -> None:
    seconds = random.uniform(0, 5)
    print(f"{layout}, time {time_no}: killed {seconds:.1f} s after the ranks were there")
    check_kill(model, expected, layout, seconds)


def test_ranks_without_a_place_are_one_error_with_the_numbers(model: str, cluster: Cluster) -> None:
    asked = processor(model, "STRICT_PACK", placement_timeout_s=3, tensor_parallel_size=4)
    with pytest.raises(Exception, match=r"4 ranks found no place in 3 s: .*STRICT_PACK.*rank: 2"):
        answers(asked)
