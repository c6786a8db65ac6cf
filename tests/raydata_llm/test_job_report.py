"""The report: what its figures are, what it says, and what it never says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from raydata_llm.job_progress import rate
from raydata_llm.job_report import JobReport, JobSettings
from raydata_llm.job_stats import ErrorKind, JobStats
from tests.raydata_llm.job_fakes import Clock, figures, finished_job, sample

CANARY = "canary-Secret-7731"


def test_its_figures_are_those_of_the_job() -> None:
    report = finished_job(4)
    assert report.status == "finished" and report.rows == report.total_rows
    assert report.first_ready == pytest.approx(38, abs=1) and report.first_row is not None
    steady = report.steady
    assert steady is not None and steady.rows_per_second == pytest.approx(16, rel=0.03)
    assert steady.output_tokens_per_second == pytest.approx(16 * 230, rel=0.03)
    assert steady.prompt_tokens_per_second == pytest.approx(16 * 140, rel=0.03)
    assert steady.rows_per_second is not None and report.rows_per_second < steady.rows_per_second, "start-up is in it"
    assert report.idle_share == pytest.approx(0.02, rel=0.05)
    assert report.starved_share == pytest.approx(0.005, rel=0.05)
    assert report.peak_kv_usage == pytest.approx(0.82)
    assert report.failed_rows == sum(error.rows for error in report.errors.values()) > 0
    assert [replica.ready for replica in report.replicas] == [38, 41, 44, 47]
    assert all(len(replica.busy) == len(report.timeline.rows) for replica in report.replicas)


def test_steady_state_is_the_span_of_the_rows_between_a_tenth_and_nine_tenths() -> None:
    clock = Clock()
    stats = JobStats(clock)
    for second in range(100):
        clock.now = second + 0.1
        stats.count_block((second, 0), 10 if 40 <= second < 60 else 1, {})
    steady = JobReport.of(
        JobSettings(model="m", shown={}), stats.snapshot(), job_id="j", status="finished", error=None, started_at=0.0,
        ended_at=100.0,
    ).steady  # fmt: skip
    assert steady is not None and steady.start == pytest.approx(28, abs=1) and steady.end == pytest.approx(72, abs=1)
    assert steady.rows_per_second == pytest.approx((2 * 12 + 200) / 44, rel=0.05)


def test_a_span_in_which_no_prompt_was_read_says_so_instead_of_nought() -> None:
    report = finished_job(1)
    assert report.steady is not None and f"rows/s, in {rate(report.steady.prompt_tokens_per_second or 0)} out" in str(
        report
    )
    steady = dataclasses.replace(report.steady, prompt_tokens_per_second=0.0)
    read_before = dataclasses.replace(report, steady=steady)
    assert "in 0" not in str(read_before) and "all prompts were read before" in str(read_before)
    in_all = rate(report.prompt_tokens / report.seconds)
    assert f'<h3>Prompt tokens/s</h3><p class="value">{in_all}</p>' in read_before.to_html()


def test_rows_that_came_out_in_one_burst_have_no_steady_rate() -> None:
    clock = Clock()
    stats = JobStats(clock)
    stats.push(sample())
    for second in range(90, 100):
        clock.now = second + 0.1
        stats.count_block((second, 0), 10, {})
    report = JobReport.of(
        JobSettings(model="m", shown={}), stats.snapshot(), job_id="j", status="finished", error=None, started_at=0.0,
        ended_at=100.0,
    )  # fmt: skip
    assert report.steady is not None and report.steady.rows_per_second is None
    assert report.rows_per_second == 1.0 and "steady" not in str(report)


def test_rows_that_an_earlier_run_had_written_are_told_apart() -> None:
    stats = JobStats(Clock())
    for block in ((0, 0), (1, 0), (1, 0)):  # a task that ran twice
        stats.skip_rows(block, 20)
    stats.count_block((1, 0), 12, {})
    report = JobReport.of(
        JobSettings(model="m", shown={}), stats.snapshot(), job_id="j", status="finished", error=None, started_at=0.0,
        ended_at=4.0, total_rows=52,
    )  # fmt: skip
    assert (report.rows, report.skipped_rows, report.total_rows) == (12, 40, 52)
    assert "12 of 52, 40 written before, 0 failed; 3 rows/s" in str(report)
    assert "of 52, 40 written before, none failed" in report.to_html()


def test_as_text_it_says_how_fast_and_why_not_faster() -> None:
    text = str(finished_job(4))
    for part in (
        "finished, 4m 02s",
        "start-up    38s to the first engine",
        "rows/s",
        "0.5% without rows, 1.5% between",
    ):
        assert part in text, text
    assert "x ValueError (engine): ValueError: the prompt has 5120 tokens" in text


def test_as_json_it_can_be_read_back() -> None:
    report = finished_job(2)
    read = json.loads(report.to_json())
    assert read["rows"] == report.rows and len(read["replicas"]) == 2
    assert read["errors"]["ValueError (engine)"]["rows"] == report.failed_rows


def test_a_report_goes_to_the_home_folder_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    finished_job(1).save("~/reports/")
    assert len(list((tmp_path / "reports").iterdir())) == 2 and not (tmp_path / "~").exists()


@pytest.mark.parametrize("where", ["", "file://"])
def test_it_is_saved_as_a_page_and_as_json(tmp_path: Path, where: str) -> None:
    report = finished_job(1)
    paths = [Path(path.removeprefix("file://")) for path in report.save(f"{where}{tmp_path}/new/folder")]
    assert [path.suffix for path in paths] == [".html", ".json"]
    assert json.loads(paths[1].read_text())["job_id"] == report.job_id
    assert paths[0].read_text() == report.to_html()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"report folder '.*/file/x' cannot be written: .*; give a folder"):
        finished_job(1).save(str(tmp_path / "file" / "x"))


def test_a_job_whose_statistics_were_lost_has_a_report_that_says_so() -> None:
    report = JobReport.of(
        JobSettings(model="m", shown={}), None, job_id="j", status="finished", error=None, started_at=0.0,
        ended_at=9.0, gap="the statistics of this run were lost after 4 s",
    )  # fmt: skip
    assert "lost after 4 s" in str(report) and "lost after 4 s" in report.to_html()
    assert report.idle_share is None and report.steady is None and json.loads(report.to_json())["rows"] == 0


def test_an_engine_that_tells_no_idle_time_is_not_called_busy() -> None:
    clock = Clock()
    stats = JobStats(clock)
    for rows in range(5):
        clock.now += 1
        stats.push(sample(rows_done=rows))
        stats.count_block((rows, 0), 1, {})
    report = JobReport.of(
        JobSettings(model="m", shown={}), stats.snapshot(), job_id="j", status="finished", error=None, started_at=0.0,
        ended_at=5.0,
    )  # fmt: skip
    assert report.idle_share is None and report.replicas[0].idle_share is None
    assert "Engine idle" not in report.to_html() and "idle" not in str(report)


def test_no_credential_is_in_any_form_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}-1")
    stats = JobStats(Clock())
    stats.push(sample(figures=figures()))
    leaky = f"OSError: s3://AKIA:{CANARY}-2@bucket/x?secret_key={CANARY}-3&region=eu refused {CANARY}-1 and {CANARY}-4"
    stats.count_block((0, 0), 1, {"OSError (engine)": ErrorKind(1, leaky)})
    settings = JobSettings(
        model=f"s3://key:{CANARY}-5@bucket/model",
        shown={"engine_kwargs": {"hf_overrides": {"note": f"{CANARY}-4"}, "api_key": f"{CANARY}-6"}},
        secrets=[f"{CANARY}-4"],
    )
    report = JobReport.of(
        settings, stats.snapshot(), job_id="j", status="failed", error=leaky, started_at=0.0, ended_at=1.0
    )
    paths = report.save(str(tmp_path))
    texts = [str(report), repr(report), report.to_json(), report.to_html(), *(Path(p).read_text() for p in paths)]
    for text in texts:
        assert CANARY not in text and "***" in text and "region=eu" in text
