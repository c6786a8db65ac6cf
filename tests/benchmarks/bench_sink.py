"""What a sink costs beside Ray Data's own `write_parquet`, on a local disk and on an S3 server (moto).

    .venv/bin/python -m tests.benchmarks.bench_sink [--rows 200000] [--repeat 3] [--stores disk s3]

Rows of text are made first and lie in the object store, so that nothing but the writing is timed; writers take turns.
The resumable one has a ledger, whose actor it asks for every row.
Printed per store and writer, as JSON: the best seconds, rows/s, MB/s of rows, files. Both read back whole, or it fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray

from raydata_llm import ResumeConfig, write_jsonl, write_parquet
from raydata_llm.resume import PLAN_SETTING, ResumePlan
from raydata_llm.row_payload import RowRequest
from raydata_llm.sink_dataset import with_setting

_BUCKET = "bench"
_TEXT_WORDS = 100
_PORT = 5077
_RESUMABLE = "raydata_llm, resumable"
_OBJECT_STORE = 800 << 20


def write_resumable(dataset: ray.data.Dataset, path: str) -> None:
    """As behind a processor with a `ResumeConfig`."""
    write_parquet(with_setting(dataset, PLAN_SETTING, ResumePlan(config=ResumeConfig(path), about={})), path)


WRITERS: dict[str, Callable[[ray.data.Dataset, str], Any]] = {
    "ray.data": lambda ds, path: ds.write_parquet(path),
    "raydata_llm": write_parquet,
    _RESUMABLE: write_resumable,
    "raydata_llm, jsonl": write_jsonl,
}


def make_rows(batch: dict[str, Any]) -> pa.Table:
    """Text as a model's answers are: words of one vocabulary, which compress two to three times."""
    ids = batch["id"]
    draw = np.random.default_rng(int(ids[0]))
    words = np.array([f"w{number:x}" for number in np.random.default_rng(0).integers(0, 1 << 20, 5000)])
    text = [" ".join(words[draw.integers(0, len(words), _TEXT_WORDS)]) for _ in ids]
    return pa.table({"id": ids, "text": text, "tokens": draw.integers(0, 500, len(ids))})


def add_keys(table: pa.Table) -> pa.Table:
    """The column that a processor leaves for the sink."""
    requests = [RowRequest(None, None, b"")] * table.num_rows
    plan = ResumePlan(config=ResumeConfig("any", key_column="id"), about={})
    return plan.admit(table, requests, table.select(["id"]).to_pylist(), [{}] * table.num_rows)


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server in a process of its own; yields the variables that lead to it."""
    endpoint = f"http://127.0.0.1:{_PORT}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(_PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(endpoint).close()
                break
            except OSError:
                time.sleep(0.1)
        names = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
        yield {**names, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    finally:
        server.kill()
        server.wait()


def measure(
    store: str, folder: Path, dataset: ray.data.Dataset, with_keys: ray.data.Dataset, rows: int, repeat: int
) -> Iterator[dict[str, Any]]:
    """The figures of each writer on one store."""
    seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
    found: dict[str, tuple[int, int]] = {}
    for turn in range(repeat):
        for name, write in WRITERS.items():
            place = f"{name.replace(', ', '-')}-{turn}"
            path = f"s3://{_BUCKET}/{place}" if store == "s3" else str(folder / place)
            started = time.perf_counter()
            write(with_keys if name == _RESUMABLE else dataset, path)
            seconds[name].append(time.perf_counter() - started)
            found[name] = check(path, rows, is_parquet="jsonl" not in name)
            shutil.rmtree(folder / place, ignore_errors=True)
    size = dataset.size_bytes() / 1e6
    for name, taken in seconds.items():
        best = min(taken)
        figures = {"seconds": best, "rows/s": rows / best, "MB/s": size / best}
        files, file_bytes = found[name]
        shown = {key: round(value, 2) for key, value in figures.items()}
        yield {"store": store, "writer": name, **shown, "files": files, "MB": round(file_bytes / 1e6, 1)}


def check(path: str, rows: int, *, is_parquet: bool) -> tuple[int, int]:
    """Files and bytes in a folder that holds every row."""
    filesystem, root = pyarrow.fs.FileSystem.from_uri(path if "://" in path else f"file://{path}")
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(root))
    infos = [info for info in infos if info.type == pyarrow.fs.FileType.File and info.size]
    if is_parquet:
        counts = [pq.ParquetFile(filesystem.open_input_file(info.path)).metadata.num_rows for info in infos]
        assert sum(counts) == rows, f"{path} holds {sum(counts)} of {rows} rows"
    return len(infos), sum(info.size for info in infos)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--stores", nargs="+", default=["disk", "s3"], choices=["disk", "s3"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server() as environment:
        os.environ.update(environment)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=_OBJECT_STORE)
        ray.data.DataContext.get_current().enable_progress_bars = False
        boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket=_BUCKET)
        rows = ray.data.range(arguments.rows, override_num_blocks=arguments.blocks)
        dataset = rows.map_batches(make_rows, batch_size=None).materialize()
        with_keys = dataset.map_batches(add_keys, batch_format="pyarrow", batch_size=None).materialize()
        for store in arguments.stores:
            for figures in measure(store, Path(folder), dataset, with_keys, arguments.rows, arguments.repeat):
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
