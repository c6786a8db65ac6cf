"""Secrets that the workers' environment alone holds: no row, report, exception or log line on the driver shows them."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from raydata_llm import EngineProcessorConfig
from raydata_llm.engine.engine_thread import EngineThread
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.job_run import Job
from raydata_llm.processor import Processor
from raydata_llm.replica import RunningEngine
from tests.raydata_llm.processor_fakes import EchoEngine
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

CANARY = "Quokka-Secret-7731Zq"
SHORT = "hu7r"


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    assert "OPENAI_KEY" not in os.environ and "DB_PASS" not in os.environ, "the driver does not know them"
    variables = {"OPENAI_KEY": CANARY, "DB_PASS": SHORT, "PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd())}
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=True,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": variables},
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def spelled(what: str) -> str:
    """The worker's secrets in several spellings; nothing on a driver that does not have them."""
    value, short = os.environ["OPENAI_KEY"], os.environ["DB_PASS"]
    code = base64.b64encode(f"user:{value}".encode()).decode()
    return f"{what} {value} {code} {json.dumps({'a': value})} http://me:{value}@host pass {short}"


class RefusingEngine(EchoEngine):
    """Refuses prompts of one length, in words that hold the secrets."""

    def add_request(self, request: Request) -> None:
        if len(request.prompt_token_ids) > 8:
            raise ValueError(spelled("engine"))
        super().add_request(request)

    def step(self) -> list[RequestOutput]:
        return super().step()


def start_refusing(source: str, kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    if kwargs.get("seed") == 13:
        raise ValueError(f"seed=13 is not valid: {spelled('start')}")
    return EngineThread(RefusingEngine(kwargs)), {}


def ask(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] == 0:
        try:
            raise PermissionError(13, spelled("cause"))
        except PermissionError as error:
            raise KeyError(spelled("preprocess")) from error
    return {"prompt": "ab" * (20 if row["id"] == 1 else 2), "sampling_params": {"max_tokens": 3}}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] == 2:
        raise RuntimeError(spelled("postprocess"))
    return {"id": row["id"], "text": row["generated_text"]}


def shows(text: str) -> list[str]:
    """Which secrets a text shows."""
    parts = {CANARY[at : at + 6] for at in range(len(CANARY) - 5)}
    codes = {base64.b64encode(bytes(place) + CANARY.encode()).decode()[4:-4] for place in range(3)}
    return [one for one in (*parts, *codes, f" {SHORT}") if one in text]


def processor_of(model: str, **settings: Any) -> Processor:
    config = EngineProcessorConfig(model_source=model, batch_size=4, concurrency=1, **settings)
    return Processor(config, ask, answer, engine_factory=start_refusing)


def test_error_rows_and_all_forms_of_the_report(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # What a driver can find out by itself must not be what keeps the secrets in.
    original = Job.of.__func__  # type: ignore[attr-defined]

    def knows_nothing(cls: type[Job], config: EngineProcessorConfig, pool: Any) -> Job:
        job: Job = original(cls, config, pool)
        object.__setattr__(job.settings, "secrets", [])
        return job

    monkeypatch.setattr(Job, "of", classmethod(knows_nothing))
    processor = processor_of(model, should_continue_on_error=True, report_path=str(tmp_path))
    dataset = processor(ray.data.range(6))
    rows = sorted(dataset.take_all(), key=lambda row: int(row["id"]))
    errors = [row["__inference_error__"] for row in rows]
    assert [bool(error) for error in errors] == [True, True, True, False, False, False]
    assert [error.split(":")[0] for error in errors[:3]] == ["KeyError", "ValueError", "RuntimeError"]
    assert all("***" in error for error in errors[:3])
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert len(files) == 2
    report = processor.report()
    for text in (*errors, *files, report.to_json(), report.to_html(), str(report), repr(dataset), dataset.stats()):
        assert not shows(text), text[:2000]
    time.sleep(1.0)  # the workers' lines are on their way
    assert not shows("".join(capfd.readouterr()))


@pytest.mark.parametrize(
    ("seed", "row", "kind"), [(0, 0, Exception), (0, 1, Exception), (0, 2, Exception), (13, 3, ValueError)]
)
def test_the_error_that_stops_a_job(
    seed: int, row: int, kind: type[Exception], model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    processor = processor_of(model, engine_kwargs={"seed": seed})
    with pytest.raises(kind) as caught:
        processor(ray.data.range(row + 1).filter(lambda one: one["id"] == row)).take_all()
    text = "".join(traceback.format_exception(caught.value))
    assert "***" in text and not shows(text), shows(text)
    time.sleep(1.0)
    shown = "".join(capfd.readouterr())
    assert not shows(shown), shows(shown)


def test_no_file_of_a_workers_output_holds_them() -> None:
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())  # type: ignore[union-attr]
    # Ray's own files about the runtime environment that it sets up are Ray's to write.
    ours = [path for path in folder.glob("worker-*") if path.is_file()]
    assert ours
    for path in ours:
        assert not shows(path.read_text(errors="replace")), path
