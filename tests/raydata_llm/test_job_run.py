"""Jobs watched on a Ray of two CPUs: what their runs leave behind, and what cannot stop them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import actors

from raydata_llm import EngineProcessorConfig, report_of
from raydata_llm.engine.phases import announce
from raydata_llm.engine.request import RequestOutput
from raydata_llm.job_report import JobReport
from raydata_llm.job_run import Job
from raydata_llm.processor import Processor
from raydata_llm.replica import RunningEngine
from tests.raydata_llm.patience import wait_until
from tests.raydata_llm.processor_fakes import EchoEngine, ray_session, serve
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

CANARY = "canary-Secret-7731"


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(SOME_PASSWORD=f"{CANARY}-password"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


class TellingEngine(EchoEngine):
    """Tells stats, as the engine's thread does."""

    def __init__(self, engine_kwargs: Mapping[str, Any], seconds: float = 0.1) -> None:
        super().__init__(engine_kwargs, seconds)
        self._started = time.monotonic()
        self._tokens = self._at_once = 0

    def step(self) -> list[RequestOutput]:
        self._at_once = len(self._running)
        outputs = super().step()
        self._tokens += sum(len(one.token_ids) for output in outputs for one in output.outputs)
        return outputs

    def stats(self) -> Any:
        seconds = time.monotonic() - self._started
        return SimpleNamespace(
            num_running=self._at_once,
            num_waiting=1,
            kv_usage=0.5,
            num_computed_tokens=3 * self._tokens,
            num_sampled_tokens=self._tokens,
            idle_seconds=seconds / 4,
            starved_seconds=seconds / 10,
        )


def start_telling(source: str, kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    announce("loading the weights")
    time.sleep(1.5)  # long enough to be seen by a line every half second, on a loaded machine too
    announce("warming up")
    return serve(TellingEngine(kwargs)), {}


def ask(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] % 10 == 3:
        raise KeyError(f"s3://key:{CANARY}-address@bucket and {CANARY}-password")
    return {"prompt": "ab" * 3}


def processor(model: str, **fields: Any) -> Processor:
    config = EngineProcessorConfig(model_source=model, batch_size=4, should_continue_on_error=True, **fields)
    return Processor(config, ask, lambda row: {"id": row["id"]}, engine_factory=start_telling)


def stats_actors() -> list[Any]:
    known = actors().values()
    return [actor for actor in known if actor["ActorClassName"] == "StatsActor" and actor["State"] != "DEAD"]


def wait_until_gone() -> list[Any]:
    wait_until(lambda: not stats_actors())
    return stats_actors()


def test_a_run_leaves_a_report_and_nothing_else(model: str, tmp_path: Path) -> None:
    built = processor(model, report_path=str(tmp_path / "reports"))
    with pytest.raises(ValueError, match="there is no report yet: nothing has run; give the processor a dataset"):
        built.report()
    dataset = built(ray.data.range(60))
    with pytest.raises(ValueError, match="nothing has run; consume the dataset first"):
        report_of(dataset)
    assert dataset.count() == 60 and stats_actors() == [], "counting runs nothing"

    dataset.write_parquet(str(tmp_path / "answers"))
    report = built.report()
    assert report_of(dataset) is report and report.status == "finished"
    assert (report.rows, report.failed_rows, report.total_rows) == (60, 6, 60)
    assert (report.prompt_tokens > 0, report.generated_rows) == (True, 54)
    assert [kind for kind in report.errors] == ["KeyError (preprocess)"]
    [replica] = report.replicas
    assert [phase for _, phase in replica.phases][-3:] == ["loading the weights", "warming up", "running"]
    assert replica.rows == 54 and report.first_ready is not None and report.first_ready >= 1.5
    assert replica.idle_share == pytest.approx(0.25, abs=0.1)
    assert replica.starved_share == pytest.approx(0.1, abs=0.06)
    assert report.peak_kv_usage == 0.5 and (report.mean_batch_size or 0) > 0

    html, written = sorted((tmp_path / "reports").iterdir())
    assert json.loads(written.read_text())["rows"] == 60 and html.read_text() == report.to_html()
    assert wait_until_gone() == []


def test_no_credential_reaches_a_report_or_the_log(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": f"{CANARY}-runtime"}
    built = processor(model, report_path=str(tmp_path), runtime_env={"env_vars": environment})
    with caplog.at_level("DEBUG", logger="raydata_llm"):
        built(ray.data.range(8)).materialize()
    report = built.report()
    texts = [str(report), report.to_json(), repr(report), *(path.read_text() for path in tmp_path.iterdir())]
    assert len(texts) == 5 and "KeyError (preprocess)" in texts[0]
    for text in [*texts, caplog.text, repr(built.config), str(built.config)]:
        assert CANARY not in text


def test_each_execution_is_a_run_of_its_own_and_others_are_none(model: str) -> None:
    built = processor(model)
    dataset = built(ray.data.range(12))
    for _ in dataset.iter_batches(batch_size=4):
        break
    first = built.report()
    assert first.rows >= 4
    kept = dataset.materialize()
    second = built.report()
    assert second is not first and second.rows == 12
    assert kept.map(lambda row: row).take_all() != [] and built.report() is second, "a child runs none of our operators"
    assert wait_until_gone() == []


def test_a_failed_job_has_a_report_with_its_cause(model: str) -> None:
    strict = Processor(EngineProcessorConfig(model_source=model), ask, engine_factory=start_telling)
    with pytest.raises(Exception, match="a row failed with KeyError"):
        strict(ray.data.range(20)).materialize()
    report = strict.report()
    assert report.status == "failed" and report.error is not None and CANARY not in report.error
    # The first line is what is printed: the row and its cause, not Ray's wrapping of them.
    assert report.error.startswith("a row failed with KeyError")
    assert wait_until_gone() == []


def test_a_job_outlives_its_statistics(model: str, tmp_path: Path) -> None:
    killed = tmp_path / "killed"

    def ask_late(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 199:
            wait_until(killed.exists)
        return ask(row)

    config = EngineProcessorConfig(model_source=model, batch_size=4, should_continue_on_error=True)
    built = Processor(config, ask_late, lambda row: {"id": row["id"]}, engine_factory=start_telling)
    dataset = built(ray.data.range(200, override_num_blocks=20))
    reports: list[JobReport] = []

    def has_rows() -> bool:
        try:
            reports.append(built.report())
        except ValueError:
            return False
        return reports[-1].rows > 0

    def kill() -> None:
        if wait_until(has_rows):
            assert built._job is not None and built._job._run is not None
            ray.kill(built._job._run._actor)
        killed.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    rows = dataset.take_all()
    killer.join()
    assert reports[-1].rows and reports[-1].status == "running", "the report so far could be had"
    assert sorted(row["id"] for row in rows) == list(range(200))
    report = built.report()
    assert report.status == "finished" and report.gap is not None and "were lost after" in report.gap


def test_the_progress_line_is_shown_where_progress_is(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydata_llm.job_run._LINE_SECONDS_IN_LOG", 0.5)
    monkeypatch.setattr("raydata_llm.job_run._POLL_SECONDS", 0.25)
    built = processor(model, max_concurrent_batches=1)
    source = ray.data.range(120)
    built(source).materialize()
    assert "raydata_llm" not in capsys.readouterr().err, "the session's progress bars are off"
    source.context.enable_progress_bars = True
    built(source).materialize()
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raydata_llm  ")]
    assert any("starting" in line and "loading the weights" in line for line in shown), shown
    assert any("/120 rows" in line and "rows/s" in line and "KV 50%" in line and "left" in line for line in shown), (
        shown
    )
    assert any("finished" in line for line in shown), "the report is printed"


def test_a_job_in_a_pickle_watches_nothing() -> None:
    from ray import cloudpickle

    context = ray.data.range(1).context.copy()
    job = Job.__new__(Job)
    callbacks: list[Any] = context.custom_execution_callback_classes
    callbacks.append(job)
    [revived] = cloudpickle.loads(cloudpickle.dumps(context)).custom_execution_callback_classes  # type: ignore[no-untyped-call]
    revived().before_execution_starts(None)
