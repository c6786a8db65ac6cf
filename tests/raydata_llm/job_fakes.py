"""Statistics of jobs that never ran, told to `JobStats` on a clock that a test sets."""

from __future__ import annotations

from typing import Any

from raydata_llm.job_report import JobReport, JobSettings
from raydata_llm.job_stats import RUNNING, ErrorKind, JobStats
from raydata_llm.replica_sample import EngineFigures, ReplicaSample


class Clock:
    """Seconds since the job began."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sample(replica: str = "host:1:a", **fields: Any) -> ReplicaSample:
    """A running replica that has done nothing."""
    plain: dict[str, Any] = {
        "replica": replica,
        "node": "host",
        "phase": RUNNING,
        "running": True,
        "rows_held": 0,
        "rows_done": 0,
        "prompt_tokens": 0,
        "output_tokens": 0,
        "figures": None,
    }
    return ReplicaSample(**{**plain, **fields})


def figures(**fields: Any) -> EngineFigures:
    """An engine that tells all and has done nothing."""
    zero = EngineFigures(num_computed_tokens=0, num_sampled_tokens=0, idle_seconds=0.0, starved_seconds=0.0)
    return zero._replace(**fields)


def finished_job(num_replicas: int, *, seconds: float = 240.0, start_up: float = 38.0, **settings: Any) -> JobReport:
    """A job whose replicas start, run evenly and thin out at the end; 4 rows a second and replica, 230 tokens a row."""
    clock = Clock()
    stats = JobStats(clock)
    block = 0
    while clock.now < seconds:
        clock.now += 1.0
        for number in range(num_replicas):
            ready = start_up + 3.0 * (number % 5)
            name = f"gpu-node-{number // 8}:{20000 + number}:{number:04x}"
            age = clock.now - ready
            if age < 0:
                phase = "fetching the model" if clock.now < ready / 2 else "loading the weights"
                stats.push(sample(name, phase=phase, running=False))
                continue
            share = min(1.0, max(0.05, (seconds - clock.now) / 30))
            rows = int(4 * age)
            engine = figures(
                num_running=int(1024 * min(1.0, age / 6) * share),
                num_waiting=int(700 * share),
                kv_usage=0.82 * min(1.0, age / 6) * share,
                num_computed_tokens=int(rows * 370),
                num_sampled_tokens=int(rows * 230),
                idle_seconds=0.02 * age,
                starved_seconds=0.005 * age,
            )
            stats.push(sample(name, rows_done=rows, prompt_tokens=140 * rows, output_tokens=230 * rows, figures=engine))
            failed = {"ValueError (engine)": ErrorKind(1, "ValueError: the prompt has 5120 tokens (engine)")}
            stats.count_block((block, 0), 4, failed if block % 97 == 5 else {})
            block += 1
    described = JobSettings(model="s3://my-bucket/models/qwen3-4b", shown={"replicas": num_replicas, **settings})
    return JobReport.of(
        described,
        stats.snapshot(),
        job_id="3f9a12c0",
        status="finished",
        error=None,
        started_at=1_795_476_000.0,
        ended_at=1_795_476_000.0 + seconds + 2,
        total_rows=4 * block,
    )
