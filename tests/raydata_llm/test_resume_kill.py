"""Drivers that are killed and run again: every row once, by key and multiplicity, whatever the moment.

The drivers are processes of their own on one Ray cluster that outlives them; each takes half a minute to start on two
cores, so most of this is marked slow.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.raydata_llm.patience import PATIENCE, on_this_machine
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.resume_job import run
from tests.raydata_llm.s3_stand import BUCKET, S3Stand, s3_stand
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
# Rows that are alike in every column come three times, in different blocks.
IDS = [*range(180), *range(0, 180, 18), *range(0, 180, 18)]

# So that a job has many files, however fast it is.
A_FILE_A_BLOCK = {"file_bytes": 1}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Stand]:
    with s3_stand() as stand:
        yield stand


@pytest.fixture(scope="module", autouse=True)
def address(s3: S3Stand) -> Iterator[str]:
    with ray_session(**s3.environment, PYTHONPATH=str(ROOT)):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


Start = Callable[..., "Job"]


class Job:
    """A driver under way."""

    def __init__(self, **settings: Any) -> None:
        command = [sys.executable, "-m", "tests.raydata_llm.resume_job", json.dumps(settings)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def summary(self) -> tuple[int, int]:
        """Rows written and rows skipped, at the end."""
        output, _ = self.process.communicate(timeout=PATIENCE)
        found = re.search(r"summary (\[.*\])", output)
        assert found, output
        rows, skipped = json.loads(found[1])
        return rows, skipped


@pytest.fixture
def job(model: str, tmp_path: Path) -> dict[str, Any]:
    """What a driver is told."""
    pq.write_table(pa.table({"id": random.sample(IDS, len(IDS))}), tmp_path / "source.parquet")
    return {"model": model, "source": str(tmp_path / "source.parquet"), "out": str(tmp_path / "out")}


@pytest.fixture
def start(address: str, job: dict[str, Any]) -> Iterator[Start]:
    jobs: list[Job] = []

    def begin(**settings: Any) -> Job:
        jobs.append(Job(address=address, **{**job, **settings}))
        return jobs[-1]

    yield begin
    for started in jobs:
        if started.process.poll() is None:
            started.kill()


def ids_in(folder: Path) -> list[int]:
    """What a plain reader of the folder finds, at any moment."""
    files = [file for file in folder.iterdir() if file.suffix == ".parquet" and not file.name.startswith(".")]
    return [row for file in files for row in pq.read_table(file)["id"].to_pylist()]


def wait_for(condition: Callable[[], object], job: Job) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert job.process.poll() is None, job.process.communicate()[0]
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def check_whole(folder: Path, ids: Sequence[int] = IDS) -> None:
    assert Counter(ids_in(folder)) == Counter(ids)
    assert not [file for file in folder.rglob("*") if file.name.endswith((".part", ".staged"))]
    schemas = {str(pq.read_schema(file)) for file in folder.glob("*.parquet")}
    assert len(schemas) == 1


def count_of(folder: Path) -> int:
    return len(list(folder.glob("[!._]*")))


@pytest.mark.slow
def test_a_driver_killed_at_ten_random_moments_leaves_every_row_once(start: Start, tmp_path: Path) -> None:
    ids = [*range(600), *range(0, 600, 20), *range(0, 600, 20)]
    pq.write_table(pa.table({"id": random.sample(ids, len(ids))}), tmp_path / "many.parquet")
    out, runs = tmp_path / "out", tmp_path / "out" / "_raydata_llm" / "runs"
    out.mkdir()
    moments: list[str] = []
    for number in range(10):
        job = start(source=str(tmp_path / "many.parquet"))
        # By turns anywhere in its start, and while it writes.
        watched, most = (runs, 6.0) if number % 2 else (out, 1.5)
        known = count_of(watched)
        wait_for(lambda known=known, watched=watched: count_of(watched) > known, job)  # type: ignore[misc]
        delay = random.uniform(0.0, most)
        time.sleep(delay)
        job.kill()
        there = Counter(ids_in(out))
        moments.append(f"{delay:.1f} s after its {'start' if number % 2 else 'first file'}: {there.total()} rows")
        assert not there - Counter(ids), f"no row twice: {moments}"
    rows, skipped = start(source=str(tmp_path / "many.parquet")).summary()
    logger.info("killed %s; the last run wrote %d of %d", ", ".join(moments), rows, len(ids))
    assert rows + skipped == len(ids) and rows and skipped
    check_whole(out, ids)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(False, id="before the file appears"),
        pytest.param(True, id="before its rows are reported", marks=pytest.mark.slow),
    ],
)
def test_a_driver_killed_between_the_ledgers_entry_and_the_file(start: Start, tmp_path: Path, after: bool) -> None:
    marker = tmp_path / "held"
    job = start(disk=("holding", {"marker": str(marker), "after": after}), **A_FILE_A_BLOCK)
    wait_for(marker.exists, job)
    job.kill()
    before = Counter(ids_in(tmp_path / "out"))
    assert before and not before - Counter(IDS)
    rows, skipped = start().summary()
    assert (rows, skipped) == (len(IDS) - before.total(), before.total())
    check_whole(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="SIGTERM"), pytest.param(signal.SIGINT, id="Ctrl-C")],
)
def test_a_driver_told_to_stop_writes_what_is_finished(start: Start, tmp_path: Path, number: int) -> None:
    progress = tmp_path / "progress"
    progress.mkdir()
    job = start(file_seconds=600.0, progress=str(progress))  # so that nothing is written but for the signal
    wait_for(lambda: len(list(progress.iterdir())) >= 30, job)
    began = time.monotonic()
    os.kill(job.process.pid, number)
    output, _ = job.process.communicate(timeout=PATIENCE)
    assert time.monotonic() - began < on_this_machine(10), output
    done = len(ids_in(tmp_path / "out"))
    assert 0 < done < len(IDS), output
    rows, skipped = start().summary()
    assert (rows, skipped) == (len(IDS) - done, done)
    check_whole(tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_stops_the_job_in_plain_words_and_loses_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    marker = tmp_path / "room"
    job |= {"disk": ("full", {"marker": str(marker)}), **A_FILE_A_BLOCK}
    with pytest.raises(OSError, match="the disk is full: make room, or write to another place, and run again"):
        run(job)
    marker.touch()
    summary = run(job)
    assert summary.rows + summary.skipped_rows == len(IDS) and summary.skipped_rows > 0
    check_whole(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a disk needs to be root's right")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_stops_the_job_and_loses_nothing(job: dict[str, Any], small_disk: Path) -> None:
    job |= {"out": str(small_disk / "out"), **A_FILE_A_BLOCK}
    with pytest.raises(OSError, match="the disk is full: make room, or write to another place, and run again"):
        run(job)
    before = Counter(ids_in(small_disk / "out"))
    assert before and not before - Counter(IDS), "some rows, none twice, no half file"
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    summary = run(job)
    assert (summary.rows, summary.skipped_rows) == (len(IDS) - before.total(), before.total())
    check_whole(small_disk / "out")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow down", "cut"])
def test_a_store_that_is_busy_or_cut_off_for_a_while_loses_nothing(
    job: dict[str, Any], s3: S3Stand, fault: str
) -> None:
    folder = f"{fault.replace(' ', '-')}/out"
    failed: Counter[str] = Counter()

    def fail_at_first(method: str, path: str) -> str | None:
        # Each file fails for longer than the client's own three or so attempts.
        if method == "GET" or "part-" not in path or failed[path.partition("?")[0]] >= 7:
            return None
        failed[path.partition("?")[0]] += 1
        return fault

    s3.fault = fail_at_first
    try:
        summary = run({**job, "out": f"s3://{BUCKET}/{folder}", "file_seconds": 2.0})
    finally:
        s3.fault = lambda method, path: None
    assert (summary.rows, summary.skipped_rows) == (len(IDS), 0) and failed
    check_on_s3(s3, folder)


@pytest.mark.slow
def test_a_store_that_is_lost_mid_write_is_resumed(start: Start, s3: S3Stand) -> None:
    job = start(out=f"s3://{BUCKET}/lost/out", **A_FILE_A_BLOCK)
    wait_for(lambda: len([key for key in s3.keys("lost/out/") if "/part-" in key]) >= 2, job)
    s3.fault = lambda method, path: "cut"
    time.sleep(2)
    job.kill()
    s3.fault = lambda method, path: None
    rows, skipped = start(out=f"s3://{BUCKET}/lost/out").summary()
    assert rows + skipped == len(IDS) and skipped > 0
    check_on_s3(s3, "lost/out")


def check_on_s3(s3: S3Stand, folder: str) -> None:
    keys = [key for key in s3.keys(f"{folder}/") if key.endswith(".parquet")]
    bodies = [s3.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys]
    ids = [row for body in bodies for row in pq.read_table(pa.BufferReader(body))["id"].to_pylist()]
    assert Counter(ids) == Counter(IDS)
    assert not [key for key in s3.uploads() if key.startswith(folder)]
