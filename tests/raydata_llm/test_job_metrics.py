"""What Prometheus is told: sums as counters that only go up, under a job's and a replica's tags, and no secret."""

from __future__ import annotations

from typing import Any

import pytest

from raydata_llm.error_kinds import error_kinds
from raydata_llm.job_metrics import JobMetrics
from raydata_llm.job_stats import JobStats
from tests.raydata_llm.job_fakes import Clock, figures, sample

CANARY = "canary-Secret-7731"


class Exported:
    """Stands in for `ray.util.metrics`, which exports nothing without Ray's dashboard."""

    values: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description.endswith(".")
        self._name, self._tag_keys = name, tag_keys

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0 and set(tags) == set(self._tag_keys)
        key = (self._name, tuple(sorted(tags.items())))
        self.values[key] = self.values.get(key, 0.0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._tag_keys)
        self.values[self._name, tuple(sorted(tags.items()))] = value


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    Exported.values = {}
    monkeypatch.setattr("ray.util.metrics.Counter", Exported)
    monkeypatch.setattr("ray.util.metrics.Gauge", Exported)
    return Exported.values


def total(exported: dict[Any, float], name: str, **tags: str) -> float:
    return exported[f"raydata_llm_{name}", tuple(sorted({"job": "j", **tags}.items()))]


def test_replicas_and_the_job_are_exported_under_their_tags(exported: dict[Any, float]) -> None:
    metrics, clock = JobMetrics("j"), Clock()
    stats = JobStats(clock)
    for second in (0, 5, 5, 10):  # a sample that came twice adds nothing
        clock.now = float(second)
        engine = figures(num_running=64, num_waiting=9, kv_usage=0.5, idle_seconds=second / 10, starved_seconds=0.0)
        told = sample("host:1:a", rows_done=8 * second, output_tokens=80 * second, figures=engine)
        stats.push(told)
        metrics.show_replica(told)
        stats.count_block((second, 0), 40, error_kinds([None, "KeyError: 'a' (preprocess)"]))
        metrics.show_job(stats.progress(160), stats.errors)
    replica = {"replica": "host:1:a"}
    assert total(exported, "generated_rows", **replica) == 80 and total(exported, "output_tokens", **replica) == 800
    assert total(exported, "running_rows", **replica) == 64 and total(exported, "waiting_rows", **replica) == 9
    assert total(exported, "kv_usage", **replica) == 0.5 and total(exported, "idle_seconds", **replica) == 1.0
    assert total(exported, "finished_rows") == 120 and total(exported, "total_rows") == 160
    assert total(exported, "error_rows", kind="KeyError (preprocess)") == 3
    assert total(exported, "rows_per_second") > 0 and total(exported, "eta_seconds") > 0


def test_no_credential_is_in_a_name_or_a_tag(exported: dict[Any, float]) -> None:
    stats = JobStats(Clock())
    stats.count_block((0, 0), 1, error_kinds([f"OSError: s3://key:{CANARY}@bucket, AWS_SECRET={CANARY} (engine)"]))
    JobMetrics("j").show_job(stats.progress(None), stats.errors)
    assert total(exported, "error_rows", kind="OSError (engine)") == 1
    assert CANARY not in str(exported)
