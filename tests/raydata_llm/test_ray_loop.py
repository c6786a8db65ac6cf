"""Ray Data's loop looks often while a run of ours goes on, and as before when it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.data._internal.execution import streaming_executor_state

from raydata_llm import EngineProcessorConfig, ray_loop
from raydata_llm.processor import Processor
from tests.raydata_llm.patience import wait_until
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.slot_engine import SlotEngineSettings, start_slot_engine
from tests.raydata_llm.tiny_tokenizer import save_tokenizer


def wait_s() -> float:
    return streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S


def test_the_wait_is_short_until_the_last_of_several_runs_ends() -> None:
    before = wait_s()
    assert before > 0.02
    ray_loop.begin_run()
    ray_loop.begin_run()
    assert wait_s() == 0.02
    ray_loop.end_run()
    assert wait_s() == 0.02
    ray_loop.end_run()
    assert wait_s() == before


def test_a_wait_that_is_shorter_already_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", 0.001)
    ray_loop.begin_run()
    assert wait_s() == 0.001
    ray_loop.end_run()
    assert wait_s() == 0.001


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("ending", ["read to the end", "dropped half way", "failed"])
def test_a_run_gives_the_wait_back_however_it_ends(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, begin_run, while_running = wait_s(), ray_loop.begin_run, []
    fails = ending == "failed"

    def begin_and_note() -> None:
        begin_run()
        while_running.append(wait_s())

    monkeypatch.setattr(ray_loop, "begin_run", begin_and_note)

    def answer(row: dict[str, object]) -> dict[str, object]:
        if fails and row["id"] == 299:
            raise RuntimeError("not this one")
        return {"id": row["id"]}

    processor = Processor(
        EngineProcessorConfig(model_source=str(save_tokenizer(tmp_path)), should_continue_on_error=False),
        lambda row: {"prompt": f"{row['id']}", "sampling_params": {"max_tokens": 4}},
        answer,
        engine_factory=start_slot_engine(SlotEngineSettings(token_seconds=0.01)),
    )
    rows = iter(processor(ray.data.range(300, override_num_blocks=3)).iter_rows())
    if fails:
        with pytest.raises(ray.exceptions.RayError, match="not this one"):
            list(rows)
    else:
        next(rows)
        assert ending == "dropped half way" or len(list(rows)) == 299
    del rows
    assert while_running == [0.02]
    assert wait_until(lambda: wait_s() == before)
