"""The whole way on one machine: HumanEval's prompts from Parquet on S3, through a real model, back to S3.

Starts an S3 server in this process (moto), puts the prompts there, runs `quickstart.py` as a user would, and shows what
came back. The bucket ends with this process, so prompts, answers and the job's
report are copied to `.demo/` first.

    make demo                        # or: python -m examples.demo --rows 32 --shown 10
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
from moto.server import ThreadedMotoServer

from examples.demo_assets import demo_dir, model_path, prompts

BUCKET = "demo"
SOURCE = f"s3://{BUCKET}/prompts"
TARGET = f"s3://{BUCKET}/answers"
NUM_PROMPT_FILES = 4
NUM_SLOTS = 64  # rows that the engine runs at once on a CPU

# Ray's log of what goes well, and two lines that it prints in any run with a pool of actors, at its start and at its
# end. All else that quickstart.py prints, warnings and errors above all, is passed on.
NOISE = re.compile(
    r"\sINFO [\w.]+:\d+ -- "
    r"|has constructor arguments in the object store and max_restarts > 0"
    r"|Failed to kill actor .* Socket closed"
)
PROGRESS = re.compile(r"MapBatches\(Replica\): ([1-9]\d*)/")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="prompts to answer, of HumanEval's 164 (default: 16)")
    parser.add_argument("--shown", type=int, default=4, help="answers to print (default: 4)")
    arguments = parser.parse_args()
    records = prompts()[: arguments.rows]
    model = model_path()
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        os.environ.pop(variable, None)
    with s3_server() as variables:
        os.environ.update(variables)  # Ray's workers inherit them
        put_prompts(records)
        say(f"{len(records)} prompts are in {SOURCE}, on an S3 server at {variables['AWS_ENDPOINT_URL']}")
        say(f"python examples/quickstart.py {os.path.relpath(model)} {SOURCE} {TARGET}")
        print("   starting Ray and loading the model", flush=True)
        seconds = run_quickstart(model, len(records))
        answers = read_table(TARGET)
        folders = [copy_to_disk(uri) for uri in (SOURCE, TARGET)]
        [page] = copy_to_disk(f"{TARGET}-report").glob("*.html")
    show(answers, arguments.shown)
    report(answers, seconds, folders)
    print(f"   {os.path.relpath(page)}  the job's report, for a browser")


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An empty S3 server on a free port of this machine; gives the variables that lead S3 clients to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "demo-access-key",
            "AWS_SECRET_ACCESS_KEY": "demo-secret-key",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


def put_prompts(records: list[dict[str, Any]]) -> None:
    """Write the prompts as a few Parquet files."""
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    filesystem, folder = pyarrow.fs.FileSystem.from_uri(SOURCE)
    for index in range(NUM_PROMPT_FILES):
        rows = [{"task_id": record["task_id"], "code": record["prompt"]} for record in records[index::NUM_PROMPT_FILES]]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), f"{folder}/part-{index}.parquet", filesystem=filesystem)


def run_quickstart(model: Path, num_rows: int) -> float:
    """Run `quickstart.py` in a process of its own, its output passed on; gives the seconds that it took."""
    command = [sys.executable, str(Path(__file__).with_name("quickstart.py")), str(model), SOURCE, TARGET]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    started = time.perf_counter()
    answered = "0"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            progress = PROGRESS.search(line)
            if progress and progress[1] != answered:
                answered = progress[1]
                print(f"   {answered} of {num_rows} rows answered", flush=True)
            elif NOISE.search(line) is None:
                print(line, end="", flush=True)
    if run.returncode != 0:
        raise SystemExit(f"quickstart.py ended with status {run.returncode}")
    return time.perf_counter() - started


def read_table(uri: str) -> list[dict[str, Any]]:
    """All rows of a folder of Parquet files."""
    filesystem, folder = pyarrow.fs.FileSystem.from_uri(uri)
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(folder, filesystem=filesystem).to_pylist()
    return rows


def copy_to_disk(uri: str) -> Path:
    """Copy a folder of the bucket to the demo's own, replacing an earlier run's."""
    folder = demo_dir() / uri.rsplit("/", 1)[-1]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pyarrow.fs.copy_files(uri, str(folder))
    return folder


def say(line: str) -> None:
    """Print a line of the demo's own, ahead of what children print next."""
    print(f"\n=> {line}", flush=True)


def show(answers: list[dict[str, Any]], count: int) -> None:
    """Print some questions with their answers."""
    for answer in sorted(answers, key=lambda row: int(row["task_id"].split("/")[1]))[:count]:
        signature = [line for line in answer["code"].splitlines() if line.startswith("def ")][-1]
        print(f"\n{answer['task_id']}  {signature}")
        print(textwrap.fill(" ".join(answer["answer"].split()), 100, initial_indent="  ", subsequent_indent="  "))


def report(answers: list[dict[str, Any]], seconds: float, folders: list[Path]) -> None:
    """Print what it took and where the files are."""
    num_tokens = sum(row["num_generated_tokens"] for row in answers)
    rates = f"{len(answers) / seconds:.1f} rows/s, {num_tokens / seconds:.0f} tokens/s"
    say(f"{len(answers)} rows, {num_tokens} tokens in {seconds:.0f} s: {rates}, Ray's and the model's start included")
    if len(answers) <= NUM_SLOTS:  # all rows were in the engine from the first to the last moment
        busy = max(row["seconds"] for row in answers)
        print(f"   the engine alone, prompts included: {busy:.0f} s, {num_tokens / busy:.0f} tokens/s")
    for folder in folders:
        files = sorted(folder.glob("*.parquet"))
        size = sum(file.stat().st_size for file in files)
        print(f"   {os.path.relpath(folder)}/  {len(files)} Parquet files, {size / 1024:.0f} kB")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
