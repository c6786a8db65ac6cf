"""The progress line: what it says before the first row, and then."""

from __future__ import annotations

import pytest

from raydata_llm.job_progress import duration, progress_line, rate, stop_line
from raydata_llm.job_stats import JobStats
from tests.raydata_llm.job_fakes import Clock, figures, sample


def test_before_the_first_row_it_says_what_each_replica_does() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.push(sample("a", phase="fetching the model", running=False))
    clock.now = 20.0
    stats.push(sample("a", phase="fetching the model", running=False))
    stats.push(sample("b", phase="loading the weights", running=False))
    stats.push(sample("c", phase="loading the weights", running=False))
    clock.now = 32.0
    assert progress_line(stats.progress(None), pool_size=5) == (
        "raydata_llm  starting, 32s | fetching the model (1 replica, 32s) | loading the weights (2 replicas, 12s) | "
        "waiting for a place in the cluster (2 replicas)"
    )
    stats.push(sample("a"))
    engine = figures(num_running=64, num_waiting=20, kv_usage=0.03, num_computed_tokens=2100, num_sampled_tokens=500)
    for replica in "abc":
        stats.push(sample(replica))
    stats.progress(None)
    clock.now = 42.0
    stats.push(sample("a", figures=engine))
    assert progress_line(stats.progress(None), pool_size=3) == (
        "raydata_llm  waiting for the first row, 42s | in 160 out 50 tokens/s | running 64 waiting 20 | KV 3%"
    )


def test_then_it_says_how_far_how_fast_how_full_and_how_long() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.count_block((1, 0), 1, {})
    stats.progress(None)
    clock.now = 10.0
    engine = figures(num_running=1021, num_waiting=410, kv_usage=0.734, num_computed_tokens=1_171_000)
    stats.push(sample("a", rows_done=3101, figures=engine._replace(num_sampled_tokens=719_000)))
    stats.count_block((0, 0), 3100, {})
    assert progress_line(stats.progress(100_000), pool_size=1) == (
        "raydata_llm  3,101/100,000 rows (3%) | 310 rows/s | in 45.2k out 71.9k tokens/s | "
        "running 1,021 waiting 410 | KV 73% | 0 errors | 5m 13s left"
    )
    assert "3,101 rows |" in progress_line(stats.progress(None), pool_size=1)
    assert "time left unknown" in progress_line(stats.progress(None), pool_size=1)


def test_rows_that_were_written_before_are_not_left_to_do() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.count_block((1, 0), 1, {})
    stats.progress(None)
    stats.skip_rows((0, 0), 499)
    clock.now = 10.0
    stats.push(sample("a", rows_done=101))
    stats.count_block((0, 0), 100, {})
    line = progress_line(stats.progress(1000), pool_size=1)
    assert "101/1,000 rows (60%), 499 written before | 10 rows/s" in line and "40s left" in line


def test_rows_written_before_are_no_more_than_all() -> None:
    stats = JobStats(lambda: 1.0)
    stats.push(sample("a", rows_done=1))
    stats.count_block((0, 0), 1, {})
    stats.skip_rows((1, 0), 10)
    assert "1/11 rows (100%), 10 written before" in progress_line(stats.progress(5), pool_size=1), "5 was a guess"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4s"), (12, "12s"), (59.7, "1m 00s"), (282, "4m 42s"), (11_100, "3h 05m"), (187_200, "2d 4h")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.352, "0.35"), (7.0, "7"), (7.25, "7.2"), (310.4, "310"), (9_999, "9,999"), (45_249, "45.2k")],
)
def test_rates_have_few_digits(number: float, text: str) -> None:
    assert rate(number) == text


def test_rows_that_are_answered_are_told_from_rows_that_are_written() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.push(sample("a", rows_done=39))
    clock.now = 10.0
    assert " 39/60 rows (65%), 0 written | " in progress_line(stats.progress(60), pool_size=1, rows_written=0)
    assert stop_line(39, 20) == (
        "raydata_llm  stopped: 20 rows are written; 19 more were answered, in blocks that are not complete, "
        "and are not written"
    )
    assert stop_line(20, 20) == "raydata_llm  stopped: 20 rows are written"


def test_a_lost_dispatcher_is_named_and_not_taken_for_a_full_cluster() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.push(sample("a", rows_done=39))
    clock.now = 10.0
    line = progress_line(stats.progress(60), pool_size=2, restarting_s=35.0)
    assert line.endswith("| the dispatcher's process was lost, another one is starting (35s)")
    assert "waiting for a place" not in line
