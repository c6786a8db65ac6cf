"""Replicas that die, hang or are killed, as real processes: every row is answered once, whatever happens to them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raydata_llm.ray_operators import claim_priority, starting
from tests.raydata_llm.faulty_engine import (
    check_rows,
    faulty_processor,
    live_actors,
    pid_of_dispatcher,
    pids_of_replicas,
    with_ids,
)
from tests.raydata_llm.patience import wait_until
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

ROWS = 600


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def wait_until_gone() -> list[str]:
    wait_until(lambda: not live_actors())
    return live_actors()


def test_a_replica_killed_in_mid_job_loses_and_repeats_no_row(model: str, tmp_path: Path) -> None:
    processor = faulty_processor(model, "", tmp_path, concurrency=2)
    rows: list[dict[str, Any]] = []
    killed = None
    for row in processor(with_ids(2 * ROWS, 40)).iter_rows():
        rows.append(row)
        if killed is None:  # whether the other has come or not
            killed = pids_of_replicas()[0]
            os.kill(killed, signal.SIGKILL)
    check_rows(rows, 2 * ROWS)
    assert wait_until_gone() == []


def test_a_dispatcher_killed_in_mid_job_loses_and_repeats_no_row(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raydata_llm")
    processor = faulty_processor(model, "", tmp_path)
    rows: list[dict[str, Any]] = []
    for row in processor(with_ids(2 * ROWS, 40)).iter_rows():
        rows.append(row)
        if len(rows) == 1:
            os.kill(pid_of_dispatcher(), signal.SIGKILL)
    check_rows(rows, 2 * ROWS)
    assert any("the dispatcher's process was lost, another one is starting" in line for line in caplog.messages)
    assert wait_until_gone() == []


@pytest.mark.parametrize("fault", ["die", "hang", pytest.param("kill", marks=pytest.mark.slow)])
def test_an_engine_that_fails_once_costs_no_row(fault: str, model: str, tmp_path: Path) -> None:
    processor = faulty_processor(model, fault, tmp_path, hang_timeout_s=4)
    check_rows(processor(with_ids(ROWS, 1)).take_all(), ROWS)
    assert (tmp_path / "fault").exists(), "it did fail"


@pytest.mark.parametrize("fault", ["poison", pytest.param("kill by poison", marks=pytest.mark.slow)])
def test_only_the_rows_that_kill_engines_alone_are_given_up(fault: str, model: str, tmp_path: Path) -> None:
    poisoned = (7, 130)
    processor = faulty_processor(model, fault, tmp_path, poisoned)
    rows = processor(with_ids(200, 4)).take_all()
    check_rows(rows, 200, failed=poisoned)
    errors = [row["__inference_error__"] for row in rows if row["id"] in poisoned]
    assert all(error.startswith("EngineDeadError: ") and error.endswith("(engine)") for error in errors), errors


def test_a_second_job_starts_where_the_first_has_left_nothing(model: str, tmp_path: Path) -> None:
    from ray.util import placement_group_table

    for _ in range(2):
        check_rows(faulty_processor(model, "", tmp_path, concurrency=2)(with_ids(60, 2)).take_all(), 60)
        assert wait_until_gone() == []
    groups = placement_group_table().values()
    assert [group for group in groups if group["state"] != "REMOVED"] == []
    # A node tells of what came back a moment later.
    assert wait_until(lambda: ray.available_resources().get("CPU") == 2)  # type: ignore[no-untyped-call]


@pytest.mark.skipif(os.geteuid() != 0, reason="raising a priority needs root's rights")
def test_an_actors_process_is_given_this_process_priority() -> None:
    class Waits:
        def pid(self) -> int:
            return os.getpid()

    actor: Any = ray.remote(num_cpus=0)(Waits).remote()
    pid: int = ray.get(actor.pid.remote())
    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0), "Ray starts it at nice 15"
    assert starting([actor]) == {}
    claim_priority(actor)
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {os.getpriority(os.PRIO_PROCESS, 0)}
    ray.kill(actor)
