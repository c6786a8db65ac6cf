"""The examples as a user runs them: from Parquet on S3, through the demo's model, back to Parquet on S3."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from examples.demo import s3_server
from examples.demo_assets import MODEL, PROMPTS, demo_dir, prompts

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent


def run_script(*arguments: str, **environment: str) -> str:
    """Run Python in the repository; gives what it printed."""
    command = [sys.executable, *arguments]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_the_quickstart_fits_on_a_screen() -> None:
    assert len((ROOT / "examples/quickstart.py").read_text().splitlines()) <= 40


@pytest.mark.model
def test_the_demo_answers_prompts_from_s3(demo_model: Path, tmp_path: Path) -> None:
    assert len(prompts()) == 164
    for asset in (MODEL, PROMPTS):
        (tmp_path / asset.name).symlink_to(demo_dir() / asset.name)
    printed = run_script("-m", "examples.demo", "--rows", "6", "--shown", "2", RAYDATA_LLM_DEMO_DIR=str(tmp_path))
    answers = pq.read_table(tmp_path / "answers").to_pylist()
    assert Counter(row["task_id"] for row in answers) == Counter(f"HumanEval/{index}" for index in range(6))
    assert all(row["answer"].strip() and 0 < row["num_generated_tokens"] <= 64 for row in answers)
    assert "6 rows" in printed and "tokens/s" in printed
    assert " ".join(printed.split()).count("This function") >= 1
    assert "Traceback" not in printed and " INFO " not in printed


@pytest.mark.model
def test_the_s3_job_keeps_columns_and_turns_bad_rows_into_error_rows(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"id": index, "prompt": f"What is {index} plus {index}?", "tags": ["a", str(index)]} for index in range(20)
    ]
    rows[7]["prompt"] = "far too long " * 300
    with s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="job-bucket")
        bucket, _ = pyarrow.fs.FileSystem.from_uri("s3://job-bucket")
        for half in range(2):
            pq.write_table(pa.Table.from_pylist(rows[half::2]), f"job-bucket/in/{half}.parquet", filesystem=bucket)
        job = ["examples/s3_batch_job.py", "--model", str(demo_model), "--max-model-len", "256", "--max-tokens", "8"]
        run_script(*job, "--input", "s3://job-bucket/in", "--output", "s3://job-bucket/out")
        table = pq.read_table("job-bucket/out", filesystem=bucket)
    answers = sorted(table.to_pylist(), key=lambda row: int(row["id"]))
    assert [{name: row[name] for name in rows[0]} for row in answers] == rows
    failed = [row for row in answers if row["__inference_error__"]]
    assert [row["id"] for row in failed] == [7]
    assert "max_model_len" in failed[0]["__inference_error__"]
    assert all(0 < row["num_generated_tokens"] <= 8 and row["generated_text"] for row in answers if row["id"] != 7)
