"""A job's statistics: counts that no lost, repeated or late message can falsify."""

from __future__ import annotations

import pytest

from raydata_llm.error_kinds import error_kinds
from raydata_llm.job_stats import JOB, ErrorKind, JobStats, Totals
from raydata_llm.job_timeline import MAX_BINS, Timeline
from raydata_llm.replica_sample import SteadyCounts
from tests.raydata_llm.job_fakes import Clock, figures, sample


def test_lost_and_repeated_samples_change_no_total() -> None:
    clock = Clock()
    stats = JobStats(clock)
    for rows in (0, 3, 3, 9):  # the samples between were lost
        clock.now += 1
        stats.push(sample(rows_done=rows, prompt_tokens=10 * rows, output_tokens=2 * rows))
    stats.push(sample("host:2:b", rows_done=1, prompt_tokens=5, output_tokens=4))
    assert stats.totals() == Totals(0, 0, 10, 95, 22)
    assert sum(stats.timeline.totals("host:1:a", "output_tokens")) == pytest.approx(18)


def test_a_block_that_ran_twice_counts_once() -> None:
    stats = JobStats(Clock())
    bad = {"KeyError (preprocess)": ErrorKind(2, "KeyError: 'a'")}
    for block in ((4, 0), (4, 1), (0, 0), (4, 0), (4, 1)):
        stats.count_block(block, 16, bad)
    assert stats.totals().rows_finished == 48 and stats.totals().rows_failed == 6
    assert stats.errors == {"KeyError (preprocess)": ErrorKind(6, "KeyError: 'a'")}
    assert sum(stats.timeline.totals(JOB, "rows")) == pytest.approx(48)


def test_rows_count_for_rates_when_they_leave_an_engine_not_when_their_block_is_done() -> None:
    clock = Clock()
    stats = JobStats(clock)
    for second in range(12):
        clock.now = float(second)
        stats.push(sample(rows_done=8 * second))
        progress = stats.progress(168)
        assert (progress.eta_seconds is None) == (second < 11), "a guess needs ten seconds of rows"
    assert progress.totals.rows_answered == 88 and progress.totals.rows_finished == 0
    assert progress.rows_per_second == pytest.approx(8) and progress.eta_seconds == pytest.approx(10)
    stats.count_block((0, 0), 88, {})
    snapshot = stats.snapshot()
    assert sum(snapshot.timeline.totals(JOB, "rows")) == pytest.approx(88), "counted once"
    assert snapshot.first_row_seconds == 1.0 and snapshot.last_row_seconds == 11.0


def test_rates_and_the_time_left_are_of_the_last_half_minute() -> None:
    clock = Clock()
    stats = JobStats(clock)
    for second in range(101):
        clock.now = float(second)
        rows = 2 * second if second < 50 else 100 + 10 * (second - 50)
        engine = figures(num_running=7, num_waiting=3, kv_usage=0.5, num_computed_tokens=30 * rows)
        stats.push(sample(rows_done=rows, figures=engine._replace(num_sampled_tokens=20 * rows)))
        stats.count_block((second, 0), 2 if second < 50 else 10, {})
        progress = stats.progress(1000)
    assert progress.rows_per_second == pytest.approx(10, rel=0.05)
    assert progress.output_tokens_per_second == pytest.approx(200, rel=0.05)
    assert progress.prompt_tokens_per_second == pytest.approx(100, rel=0.05)
    assert (progress.num_running, progress.num_waiting, progress.kv_usage) == (7, 3, 0.5)
    left = 1000 - progress.totals.rows_finished
    assert progress.eta_seconds == pytest.approx(left / 10, rel=0.05)


def test_a_replica_that_fell_silent_is_in_no_level_and_its_rows_still_count() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.push(sample("dead", rows_done=5, figures=figures(num_running=100, kv_usage=1.0)))
    clock.now = 60.0
    stats.push(sample("new", phase="loading the weights", running=False))
    clock.now = 65.0
    progress = stats.progress(None)
    assert progress.num_running == 0 and progress.kv_usage is None and progress.eta_seconds is None
    assert progress.phases == {"loading the weights": (1, 5.0)} and progress.num_ready == 0
    assert progress.totals.rows_generated == 5


def test_an_engine_that_is_replaced_goes_on_counting() -> None:
    counts = SteadyCounts()
    first = figures(num_computed_tokens=100, num_sampled_tokens=60, idle_seconds=2.0, starved_seconds=1.0)
    assert counts.continued(first) == first
    second = figures(num_computed_tokens=10, num_sampled_tokens=6, idle_seconds=0.5, starved_seconds=0.25)
    assert counts.continued(second) == first._replace(
        num_computed_tokens=110, num_sampled_tokens=66, idle_seconds=2.5, starved_seconds=1.25
    )
    later = counts.continued(second._replace(num_computed_tokens=30))
    assert later.num_computed_tokens == 130


def test_a_week_takes_as_many_bins_as_an_hour() -> None:
    timeline = Timeline(bin_seconds=0.5)
    for second in range(0, 7 * 24 * 3600, 600):
        timeline.add("a", "rows", 3.0, start=second, end=second)
        timeline.see("a", "level", float(second), start=second, end=second + 1)
    assert timeline.num_bins <= MAX_BINS and timeline.num_bins * timeline.bin_seconds >= 7 * 24 * 3600 - 600
    assert sum(timeline.totals("a", "rows")) == pytest.approx(3.0 * 1008), "nothing is lost when bins are merged"
    levels = [level for level in timeline.means("a", "level") if level is not None]
    assert levels == sorted(levels) and levels[-1] > 6.9 * 24 * 3600
    assert timeline.means("nobody", "level") == [None] * timeline.num_bins


def test_what_came_up_in_a_silence_is_spread_over_it() -> None:
    timeline = Timeline(bin_seconds=1.0)
    timeline.add("a", "tokens", 10.0, start=0.5, end=3.0)
    timeline.see("a", "kv", 0.5, start=0.5, end=3.0)
    timeline.see("a", "kv", 0.9, start=3.0, end=3.25)
    assert timeline.totals("a", "tokens") == [2.0, 4.0, 4.0, 0.0]
    assert timeline.means("a", "kv") == pytest.approx([0.5, 0.5, 0.5, 0.9])


def test_errors_are_told_apart_by_type_and_stage() -> None:
    kinds = error_kinds(
        [None, "KeyError: 'a' (preprocess)", "KeyError: 'b' (preprocess)", "ValueError: too long (engine)", "strange"]
    )
    assert kinds == {
        "KeyError (preprocess)": ErrorKind(2, "KeyError: 'a' (preprocess)"),
        "ValueError (engine)": ErrorKind(1, "ValueError: too long (engine)"),
        "error": ErrorKind(1, "strange"),
    }
