"""What a job leaves on its cluster, however it ends: no actor, placement group or object, so that the next starts."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raydata_llm import EngineProcessorConfig, write_parquet
from raydata_llm.dispatch_plan import ReplicaPlan
from raydata_llm.lease_book import LeaseBook
from raydata_llm.processor import Processor
from raydata_llm.replica_link import ReplicaLink
from tests.raydata_llm.faulty_engine import live_actors, pids_of_replicas
from tests.raydata_llm.patience import on_this_machine, wait_until
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.slot_engine import SlotEngineSettings, start_slot_engine
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SHORT = 8  # rows of the first block, which are done at once; the others would take an hour


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """pytest keeps log records, and with them errors, their frames and what these hold."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def job(model: str, rows: int = 64) -> ray.data.Dataset:
    """A job whose engines are busy for an hour with all but its first block.

    There is a slot for each row: long ones go first, and would keep the short ones waiting for that hour.
    """

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "ab", "sampling_params": {"max_tokens": 1 if row["id"] < SHORT else 36_000}}

    config = EngineProcessorConfig(model_source=model, concurrency=2, batch_size=SHORT)
    engines = start_slot_engine(SlotEngineSettings(max_num_seqs=64, token_seconds=0.1))
    return Processor(config, ask, engine_factory=engines)(ray.data.range(rows, override_num_blocks=4))


def written(dataset: ray.data.Dataset, folder: Path) -> None:
    assert write_parquet(dataset.limit(SHORT), str(folder)).rows == SHORT


def looked_at(dataset: ray.data.Dataset, folder: Path) -> None:
    assert len(dataset.take(5)) == 5


def failed(dataset: ray.data.Dataset, folder: Path) -> BaseException:
    try:
        dataset.map(lambda row: {"id": row["id"] / 0}).materialize()
    except Exception as error:
        return error  # with its traceback, as a notebook keeps it
    raise AssertionError("it did not fail")


def interrupted(dataset: ray.data.Dataset, folder: Path) -> BaseException:
    def interrupt() -> None:
        wait_until(pids_of_replicas)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as caught:
        dataset.materialize()
    return caught.value


ENDS: list[Callable[[ray.data.Dataset, Path], BaseException | None]] = [written, looked_at, failed, interrupted]


@pytest.mark.parametrize("end", ENDS)
def test_a_job_leaves_nothing_however_it_ends(
    end: Callable[[ray.data.Dataset, Path], BaseException | None], model: str, tmp_path: Path
) -> None:
    error = end(job(model), tmp_path)
    # Ray alone would end replicas after five seconds, or when the error is forgotten, or when their rows are done.
    soon = on_this_machine(3.0) if error is None else 60.0
    assert wait_until(lambda: not live_actors(), soon), live_actors()
    del error
    gc.collect()
    assert wait_until(lambda: not references(), 30.0), references()
    # A node tells of what came back a moment later.
    assert wait_until(lambda: ray.available_resources() == ray.cluster_resources(), 30.0), in_use()  # type: ignore[no-untyped-call]
    groups = ray.util.placement_group_table().values()
    assert [group for group in groups if group["state"] != "REMOVED"] == []


def test_a_job_may_end_while_its_replicas_start(tmp_path: Path) -> None:
    """Ray's core crashes under a thread that waits in it when the process ends: such a link waits in Python."""
    over = tmp_path / "over"

    def start(*_: Any) -> Any:
        while not over.exists():
            time.sleep(0.05)
        raise ValueError("no engine")

    plan = ReplicaPlan(
        model_source="none",
        engine_kwargs={},
        actor_options={"num_cpus": 0},
        max_pending_rows=None,
        hang_timeout_s=60.0,
        engine_factory=start,
    )
    book = LeaseBook()
    link = ReplicaLink(plan, book, lambda given_up: None)
    try:
        assert wait_until(lambda: link.is_placed, 60.0)
        assert wait_until(
            lambda: any("start.remote" in (frame.line or "") for frame in frames_of("replica link")), 10.0
        )
        time.sleep(0.2)  # the call itself is over
        assert not {frame.name for frame in frames_of("replica link")} & {"get", "get_objects"}
    finally:
        over.touch()
    assert wait_until(lambda: not frames_of("replica link"), 30.0)
    with pytest.raises(ValueError, match="no engine"):
        book.put([b"row"], [1])


def frames_of(name: str) -> list[traceback.FrameSummary]:
    """Where the thread of this name is; empty if there is none."""
    thread = next((thread for thread in threading.enumerate() if thread.name == name), None)
    frame = None if thread is None else sys._current_frames().get(thread.ident or 0)
    return [] if frame is None else list(traceback.extract_stack(frame))


def references() -> dict[str, Any]:
    """Objects that this process still refers to, with how often."""
    from ray._private.worker import global_worker

    found: dict[str, Any] = global_worker.core_worker.get_all_reference_counts()  # type: ignore[attr-defined]
    return found


def in_use() -> dict[str, float]:
    """What is not given back: CPUs, bytes of the object store."""
    available = ray.available_resources()  # type: ignore[no-untyped-call]
    return {name: of - available.get(name, 0.0) for name, of in ray.cluster_resources().items()}  # type: ignore[no-untyped-call]
