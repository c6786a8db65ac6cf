"""What reaches the engines of a job, in which order rows come back, and what stops a job, on a Ray of two CPUs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray import cloudpickle

from raydata_llm import EngineProcessorConfig, ResumeConfig
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.processor import Processor
from raydata_llm.replica import EngineFactory, RunningEngine
from tests.raydata_llm.patience import on_this_machine
from tests.raydata_llm.processor_fakes import EchoEngine, ray_session, serve, start_nothing
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


class RecordingEngine(EchoEngine):
    """Notes the requests that reach it, in a file of this process."""

    def __init__(self, engine_kwargs: Mapping[str, Any], folder: Path) -> None:
        super().__init__(engine_kwargs)
        self._file = (folder / f"{os.getpid()}.requests").open("a")

    def add_request(self, request: Request) -> None:
        print(json.dumps([request.key, request.sampling_params.to_mapping()]), file=self._file, flush=True)
        super().add_request(request)


def recording(folder: Path) -> EngineFactory:
    def start(source: str, kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        return serve(RecordingEngine(kwargs, folder)), {}

    return start


def recorded(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Key and parameters of all requests, and a clean folder."""
    lines = []
    for file in folder.glob("*.requests"):
        lines += file.read_text().splitlines()
        file.unlink()
    return [json.loads(line) for line in lines]


def config(model: str, **fields: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(model_source=model, **fields)


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "ab", "sampling_params": {"max_tokens": 2}}


def test_a_look_at_a_dataset_runs_at_most_a_block(model: str, tmp_path: Path) -> None:
    processor = Processor(
        config(model, batch_size=32), ask, lambda row: {"id": row["id"]}, engine_factory=recording(tmp_path)
    )
    dataset = processor(ray.data.range(1000, override_num_blocks=10))
    assert dataset.count() == 1000 and recorded(tmp_path) == []
    assert dataset.schema().names == ["id"] and 1 <= len(recorded(tmp_path)) <= 32
    assert len(dataset.take(5)) == 5 and 5 <= len(recorded(tmp_path)) <= 32


def test_rows_come_back_in_order_on_request(model: str, tmp_path: Path) -> None:
    settings = config(model, batch_size=16, concurrency=2, preserve_order=True)
    processor = Processor(settings, ask, engine_factory=recording(tmp_path))
    rows = processor(ray.data.range(400, override_num_blocks=7)).take_all()
    assert [row["id"] for row in rows] == list(range(400))


PARAMETER_SETS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 3},
    {"top_k": 5},
    {"top_k": -1, "top_p": 0.5},
    {"temperature": 0},
    {"temperature": 0.0, "max_tokens": 1},
    {"seed": 0},
    {"seed": 2**40},
    {"stop": "a"},
    {"stop": ["a", "bc"]},
    {"stop_token_ids": [3, 5]},
    {"logit_bias": {"3": -100.0}},
    {"ignore_eos": True},
    {"min_p": 0.25, "min_tokens": 1},
    {"n": 2},
    {"logprobs": 1},
    {"repetition_penalty": 1.5},
    {"presence_penalty": -0.5},
    {"frequency_penalty": 0.75, "skip_special_tokens": False},
    {"detokenize": False, "include_stop_str_in_output": True},
]


def test_twenty_parameter_sets_in_one_block_arrive_exactly(model: str, tmp_path: Path) -> None:
    from raydata_llm.engine.sampling_params import SamplingParams

    processor = Processor(
        config(model),
        lambda row: {"prompt": "ab", "sampling_params": PARAMETER_SETS[row["id"]]},
        engine_factory=recording(tmp_path),
    )
    rows = processor(ray.data.range(len(PARAMETER_SETS), override_num_blocks=1)).take_all()
    wanted = [SamplingParams.from_mapping(params).to_mapping() for params in PARAMETER_SETS]
    in_order = sorted(rows, key=lambda row: row["id"])
    assert [json.loads(row["params"]) for row in in_order] == json.loads(json.dumps(wanted))
    reached = [json.dumps(params, sort_keys=True) for _, params in recorded(tmp_path)]
    assert sorted(reached) == sorted(json.dumps(params, sort_keys=True) for params in wanted)


def test_copies_of_a_row_draw_differently_in_whatever_blocks_they_lie(model: str, tmp_path: Path) -> None:
    def keys_of(blocks: int) -> list[int]:
        processor = Processor(config(model, batch_size=8), ask, engine_factory=recording(tmp_path))
        same = ray.data.range(40, override_num_blocks=blocks).map(lambda row: {"text": f"{row['id'] % 4}"})
        processor(same).materialize()
        return [key for key, _ in recorded(tmp_path)]

    first = keys_of(5)
    assert len(first) == len(set(first)) == 40
    assert sorted(keys_of(2)) == sorted(first), "the same draws in every run"


def test_a_dataset_of_one_row_with_nulls_and_nested_columns(model: str, tmp_path: Path) -> None:
    columns = {
        "id": pa.array([3], pa.int16()),
        "nothing": pa.array([None], pa.list_(pa.int8())),
        "nested": pa.array([{"a": [{"b": None}], "c": "x"}]),
    }
    processor = Processor(config(model), ask, engine_factory=recording(tmp_path))
    kept = processor(ray.data.from_arrow(pa.table(columns))).select_columns(list(columns))
    [table] = [ray.get(ref) for ref in kept.to_arrow_refs()]
    assert table.cast(pa.table(columns).schema).equals(pa.table(columns))


class LonelyEngine(EchoEngine):
    """Answers a row at a time until there are two of its kind, so that some wait however late the second comes."""

    def __init__(self, engine_kwargs: Mapping[str, Any], folder: Path) -> None:
        super().__init__(engine_kwargs, seconds=0.2)
        self._folder = folder
        (folder / f"{os.getpid()}.engine").touch()

    def step(self) -> list[RequestOutput]:
        if len(list(self._folder.glob("*.engine"))) > 1:
            return super().step()
        time.sleep(0.1)
        return [self._answer(self._running.pop())] if self._running else []


def test_a_pool_grows_while_rows_wait(model: str, tmp_path: Path) -> None:
    def start(source: str, kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
        return serve(LonelyEngine(kwargs, tmp_path)), {}

    settings = config(model, batch_size=64, concurrency=(1, 2))
    processor = Processor(settings, ask, lambda row: {"process": row["stop_reason"]}, engine_factory=start)
    rows = processor(ray.data.range(3000)).take_all()
    assert len(rows) == 3000 and len({row["process"] for row in rows}) == 2


def stopped(processor: Processor, source: Any, kind: type[Exception] = ValueError) -> str:
    """What a job is stopped with, within the time that it has."""
    started = time.monotonic()
    with pytest.raises(kind) as error:
        processor(source).materialize()
    assert time.monotonic() - started < on_this_machine(30)
    return str(error.value)


def test_a_pool_without_a_place_says_what_was_asked_and_what_there_is(model: str) -> None:
    settings = config(model, resources_per_bundle={"unicorn": 2, "CPU": 1}, placement_timeout_s=2, concurrency=3)
    told = stopped(Processor(settings, ask, engine_factory=start_nothing), ray.data.range(3))
    assert "no replica found a place in 2 s: each of 3 asks for {'CPU': 1" in told and "'unicorn': 2" in told
    assert "'CPU': '2 of 2'" in told or "'CPU': '1 of 2'" in told


def test_an_engine_that_cannot_start_is_a_value_error_and_not_a_death_notice(model: str) -> None:
    told = stopped(Processor(config(model), ask, engine_factory=start_nothing), ray.data.range(3))
    assert "kv_cache_memory_bytes=1 is not valid" in told
    assert "ActorDiedError" not in told and "actor died" not in told


def test_what_only_a_task_can_find_is_a_value_error_too(model: str, tmp_path: Path) -> None:
    ours = ray.data.from_items([{"__raydata_llm_output": 1, "prompt": "x"}])
    told = stopped(Processor(config(model), engine_factory=start_nothing), ours)
    assert "column '__raydata_llm_output' has a name that raydata_llm needs itself: rename it" in told
    resume = ResumeConfig(str(tmp_path / "out"), key_column="document")
    keyless = Processor(config(model, resume=resume), ask, engine_factory=start_nothing)
    assert "key_column='document' is not a column: the row has id" in stopped(keyless, ray.data.range(3))
    nameless = Processor(config(str(tmp_path)), ask, engine_factory=start_nothing)
    assert "has no config.json in the folder: check that" in stopped(nameless, ray.data.range(3))


def test_a_job_whose_template_is_broken_is_stopped(model: str, tmp_path: Path) -> None:
    from raydata_llm.block_memory import TooManyErrorsError

    def ask_some(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["question"] if row["id"] % 2 else "ab"}

    settings = config(model, batch_size=64, should_continue_on_error=True, max_error_fraction=0.3)
    processor = Processor(settings, ask_some, engine_factory=recording(tmp_path))
    told = stopped(processor, ray.data.range(2000), Exception)
    assert TooManyErrorsError.__name__ in told
    assert "max_error_fraction=0.3" in told and "KeyError: 'question'; the row has " in told


def test_a_row_that_crashes_its_process_stops_the_job_and_does_not_run_for_ever(model: str) -> None:
    processor = Processor(
        EngineProcessorConfig(model_source=model),
        lambda row: os._exit(3),
        engine_factory=start_nothing,  # it comes to no engine
        preprocess_map_kwargs={"max_retries": 1},  # eight, if nothing is said
    )
    with pytest.raises(ray.exceptions.RayError, match="The worker died unexpectedly while executing this task"):
        processor(ray.data.range(8)).materialize()
