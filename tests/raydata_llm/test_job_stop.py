"""`ray job stop`, as a user gives it: what is finished is committed, and the same job again does the rest.

Needs Ray's dashboard (`pip install 'ray[default]'`); skipped where that is absent.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.raydata_llm.patience import wait_until
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

for needed in ("aiohttp_cors", "opencensus", "opentelemetry.exporter.prometheus", "prometheus_client", "colorful"):
    pytest.importorskip(needed, reason="needs Ray's dashboard: pip install 'ray[default]'", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
IDS = list(range(200))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from ray.job_submission import JobSubmissionClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")  # README's advice: 3 s are few on a loaded machine
        head = {
            "num_cpus": 2,
            "object_store_memory": 200 << 20,
            "include_dashboard": True,
            "dashboard_port": 0,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        context = ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield JobSubmissionClient(f"http://{context.dashboard_url}")
        finally:
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]


def submit(client: Any, job: dict[str, Any]) -> str:
    command = [sys.executable, "-m", "tests.raydata_llm.resume_job", json.dumps({"address": "auto", **job})]
    return str(client.submit_job(entrypoint=f"cd {ROOT} && PYTHONPATH={ROOT} exec {shlex.join(command)}"))


def ended(client: Any, submission: str) -> str:
    """How the job ended."""
    assert wait_until(lambda: client.get_job_status(submission).is_terminal()), client.get_job_logs(submission)
    return str(client.get_job_status(submission).value)


def ids_in(folder: Path) -> Counter[int]:
    files = [file for file in folder.iterdir() if file.suffix == ".parquet" and not file.name.startswith(".")]
    return Counter(row for file in files for row in pq.read_table(file)["id"].to_pylist())


def test_a_job_that_is_stopped_keeps_what_is_finished_and_goes_on_when_it_is_run_again(
    client: Any, tmp_path: Path
) -> None:
    out, progress = tmp_path / "out", tmp_path / "progress"
    progress.mkdir()
    pq.write_table(pa.table({"id": random.sample(IDS, len(IDS))}), tmp_path / "source.parquet")
    job = {
        "model": str(save_tokenizer(tmp_path / "model")),
        "source": str(tmp_path / "source.parquet"),
        "out": str(out),
        "progress": str(progress),
        "file_seconds": 600.0,  # so that nothing is written but for the stop
    }
    first = submit(client, job)
    seen = wait_until(lambda: len(list(progress.iterdir())) >= 30 or client.get_job_status(first).is_terminal())
    assert seen and not client.get_job_status(first).is_terminal(), client.get_job_logs(first)
    assert client.stop_job(first)
    assert ended(client, first) == "STOPPED"
    there = ids_in(out)
    assert 0 < there.total() < len(IDS) and not there - Counter(IDS), client.get_job_logs(first)
    assert not [file for file in out.rglob("*") if file.name.endswith((".part", ".staged"))]

    second = submit(client, job)
    assert ended(client, second) == "SUCCEEDED", client.get_job_logs(second)
    found = re.search(r"summary (\[.*\])", client.get_job_logs(second))
    assert found and json.loads(found[1]) == [len(IDS) - there.total(), there.total()]
    assert ids_in(out) == Counter(IDS)
