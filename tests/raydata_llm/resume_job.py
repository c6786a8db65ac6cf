"""A job that tests kill: `python -m tests.raydata_llm.resume_job '{"address": ..., ...}'`.

Its engine draws latencies and answers afresh in every process, so that a row which ran twice shows, and blocks that
differ between two attempts do too.
"""

from __future__ import annotations

import functools
import json
import math
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from raydata_llm import EngineProcessorConfig, ResumeConfig, WriteSummary, write_parquet
from raydata_llm.engine.request import CompletionOutput, Request, RequestOutput
from raydata_llm.processor import Processor
from tests.raydata_llm.faulty_disks import FullDisk, HoldingDisk
from tests.raydata_llm.processor_fakes import EchoEngine, serve

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]
cloudpickle.register_pickle_by_value(sys.modules["tests.raydata_llm.processor_fakes"])  # type: ignore[no-untyped-call]


class DrawnEngine(EchoEngine):
    """Each row takes as long as it likes and says what it likes."""

    max_num_seqs = 8

    def __init__(self, engine_kwargs: Mapping[str, Any]) -> None:
        super().__init__(engine_kwargs)
        self._draw = random.SystemRandom()
        self._ends: dict[str, float] = {}

    def step(self) -> list[RequestOutput]:
        time.sleep(0.01)
        now = time.monotonic()
        for request in self._running[: self.max_num_seqs]:
            self._ends.setdefault(request.request_id, now + self._draw.uniform(0.05, 0.4))
        done = [request for request in self._running if self._ends.get(request.request_id, math.inf) <= now]
        self._running = [request for request in self._running if self._ends.get(request.request_id, math.inf) > now]
        return [self._answer(request) for request in done]

    def _answer(self, request: Request) -> RequestOutput:
        prompt = [int(token_id) for token_id in request.prompt_token_ids]
        token_ids = [self._draw.randrange(3, 40) for _ in range(self._draw.randrange(1, 30))]
        output = CompletionOutput(0, token_ids, "length", str(self._draw.random()), "", -1.5, None)
        return RequestOutput(request.request_id, prompt, [output])


def start_drawn(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Stands in for `raydata_llm.replica.start_engine`."""
    return serve(DrawnEngine(engine_kwargs)), {}


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": f"row {row['id']}", "sampling_params": {"max_tokens": 30}}


def keep(progress: str | None, row: dict[str, Any]) -> dict[str, Any]:
    if progress is not None:
        Path(progress, str(row["id"])).touch()
    return {"id": row["id"], "text": row["generated_text"], "draw": row["stop_reason"]}


def run(job: Mapping[str, Any]) -> WriteSummary:
    """Run the job on the Ray that this process is connected to."""
    config = EngineProcessorConfig(
        model_source=job["model"], batch_size=8, max_concurrent_batches=4, resume=ResumeConfig(job["out"])
    )
    postprocess = functools.partial(keep, job.get("progress"))
    processor = Processor(config, ask, postprocess, engine_factory=start_drawn)
    kind, options = job.get("disk", (None, {}))
    disks: dict[str, Any] = {"holding": HoldingDisk, "full": FullDisk}
    return write_parquet(
        processor(ray.data.read_parquet(job["source"])),
        job["out"],
        filesystem=None if kind is None else disks[kind](**options),
        file_bytes=job.get("file_bytes", 128 << 20),
        file_seconds=job.get("file_seconds", 0.7),
    )


def main() -> None:
    """Run the job on an existing cluster and print its summary."""
    job = json.loads(sys.argv[1])
    root = str(Path(__file__).parents[2])
    ray.init(address=job["address"], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    ray.data.DataContext.get_current().enable_progress_bars = False
    summary = run(job)
    print("summary", json.dumps([summary.rows, summary.skipped_rows]), flush=True)


if __name__ == "__main__":
    main()
