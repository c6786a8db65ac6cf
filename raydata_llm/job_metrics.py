"""A job's figures as Prometheus metrics, at the metrics port of each Ray node.

Owns the metrics' names and tags. Lives in the job's statistics actor, so the series end with the job. Counters are of
work done: a row that ran twice after a replica's death counts twice; `finished_rows` counts each once.

    ray_raydata_llm_generated_rows_total{job, replica}    ray_raydata_llm_running_rows{job, replica}
    ray_raydata_llm_prompt_tokens_total{job, replica}     ray_raydata_llm_waiting_rows{job, replica}
    ray_raydata_llm_output_tokens_total{job, replica}     ray_raydata_llm_kv_usage{job, replica}
    ray_raydata_llm_idle_seconds_total{job, replica}      ray_raydata_llm_rows_per_second{job}
    ray_raydata_llm_starved_seconds_total{job, replica}   ray_raydata_llm_tokens_per_second{job, kind=prompt|output}
    ray_raydata_llm_finished_rows_total{job}              ray_raydata_llm_eta_seconds{job}
    ray_raydata_llm_error_rows_total{job, kind}           ray_raydata_llm_total_rows{job}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydata_llm.job_stats import ErrorKind, Progress
from raydata_llm.replica_sample import ReplicaSample

_REPLICA_COUNTERS = {
    "generated_rows": "Rows that came out of a replica's engine.",
    "prompt_tokens": "Prompt tokens of these rows.",
    "output_tokens": "Output tokens of these rows.",
    "idle_seconds": "Seconds in which the engine had no step in flight.",
    "starved_seconds": "Of these, seconds in which it had no row either.",
}
_REPLICA_GAUGES = {
    "running_rows": "Sequences in the engine's batch.",
    "waiting_rows": "Sequences queued in the engine.",
    "kv_usage": "Share of KV blocks in use, 0 to 1.",
}
_JOB_GAUGES = {
    "rows_per_second": "Rows a second through the engines, over the last 30 s.",
    "eta_seconds": "Seconds until the last row, at the present rate.",
    "total_rows": "Rows of the dataset, as far as known.",
}


class JobMetrics:
    """Exports what the job's statistics are told.

    Args:
        job_id: The tag `job`.
    """

    def __init__(self, job_id: str) -> None:
        from ray.util.metrics import Counter, Gauge

        def name(short: str) -> str:
            return f"raydata_llm_{short}"

        def replica_metric(kind: Any, short: str, description: str) -> Any:
            return kind(name(short), description, tag_keys=("job", "replica"))

        self._job_id = job_id
        self._exported: dict[tuple[str, str], float] = {}
        self._counters = {s: replica_metric(Counter, s, text) for s, text in _REPLICA_COUNTERS.items()}
        self._gauges = {s: replica_metric(Gauge, s, text) for s, text in _REPLICA_GAUGES.items()}
        self._job_gauges = {s: Gauge(name(s), text, tag_keys=("job",)) for s, text in _JOB_GAUGES.items()}
        self._tokens = Gauge(name("tokens_per_second"), "Tokens a second, over 30 s.", tag_keys=("job", "kind"))
        self._finished = Counter(name("finished_rows"), "Rows that left the last operator.", tag_keys=("job",))
        self._errors = Counter(name("error_rows"), "Of these, rows that failed.", tag_keys=("job", "kind"))

    def show_replica(self, sample: ReplicaSample) -> None:
        """Export a replica's counts."""
        figures = sample.figures
        counts: dict[str, float] = {
            "generated_rows": sample.rows_done,
            "prompt_tokens": sample.prompt_tokens,
            "output_tokens": sample.output_tokens,
        }
        levels: dict[str, float] = {"running_rows": sample.rows_held}
        if figures is not None:
            counts |= {"idle_seconds": figures.idle_seconds or 0.0, "starved_seconds": figures.starved_seconds or 0.0}
            levels = {
                "running_rows": figures.num_running,
                "waiting_rows": figures.num_waiting,
                "kv_usage": figures.kv_usage,
            }
        tags = {"job": self._job_id, "replica": sample.replica}
        for short, value in counts.items():
            self._raise_to(self._counters[short], short + sample.replica, value, tags)
        for short, value in levels.items():
            self._gauges[short].set(value, tags=tags)

    def show_job(self, progress: Progress, errors: Mapping[str, ErrorKind]) -> None:
        """Export the job's figures."""
        tags = {"job": self._job_id}
        self._job_gauges["rows_per_second"].set(progress.rows_per_second, tags=tags)
        if progress.eta_seconds is not None:
            self._job_gauges["eta_seconds"].set(progress.eta_seconds, tags=tags)
        if progress.total_rows is not None:
            self._job_gauges["total_rows"].set(progress.total_rows, tags=tags)
        self._tokens.set(progress.prompt_tokens_per_second, tags={**tags, "kind": "prompt"})
        self._tokens.set(progress.output_tokens_per_second, tags={**tags, "kind": "output"})
        self._raise_to(self._finished, "finished", progress.totals.rows_finished, tags)
        for kind, error in errors.items():
            self._raise_to(self._errors, "error", error.rows, {**tags, "kind": kind})

    def _raise_to(self, counter: Any, key: str, value: float, tags: dict[str, str]) -> None:
        """Counters go up by steps; ours come as sums."""
        known = (key, tags.get("kind", ""))
        step = value - self._exported.get(known, 0.0)
        if step > 0:
            counter.inc(step, tags=tags)
            self._exported[known] = value
