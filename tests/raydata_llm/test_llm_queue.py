"""LLM's queue: results as they finish or all at the end, nothing lost by Ctrl-C or a left loop, and reset."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import LLM, SamplingParams
from raydata_llm.engine.pooling_request import PoolingRequestOutput
from raydata_llm.engine.request import RequestOutput
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "max_num_seqs": 4}
PROMPTS = [f"row {index}" for index in range(6)]


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def shared_llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), **SETTINGS) as made:
        yield made


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    shared_llm.reset()


def greedy(max_tokens: int = 5) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def written(results: list[RequestOutput]) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in results]


def interrupt_step(llm: LLM, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the engine's step of that number."""
    engine = llm._live_engine()
    step, left = engine.step, [number]

    def counted() -> list[RequestOutput]:
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", counted)


def test_waiting_gives_what_generate_gives(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, greedy())
    ids = llm.enqueue(PROMPTS[:2], greedy())
    ids += llm.enqueue(PROMPTS[2:], [greedy()] * 4)
    results = llm.wait_for_completion(output_type=RequestOutput)
    assert [result.request_id for result in results] == ids
    assert [result.prompt for result in results] == PROMPTS
    assert written(results) == written(expected)
    assert llm.wait_for_completion() == []


def test_conversations_are_enqueued_as_chat_takes_them(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    expected = llm.chat(conversation, greedy(), chat_template_kwargs={"mood": "glad"})
    llm.enqueue_chat([conversation] * 2, greedy(), chat_template_kwargs={"mood": "glad"})
    results = llm.wait_for_completion(use_tqdm=False)
    assert [result.prompt for result in results] == [expected[0].prompt] * 2
    assert written(results) == written(expected) * 2


def test_results_come_as_they_finish(llm: LLM) -> None:
    long, short = llm.enqueue(["long", "short"], [greedy(30), greedy(2)])
    assert [result.request_id for result in llm.as_completed()] == [short, long]
    assert list(llm.as_completed()) == []


def test_a_loop_may_enqueue_more(llm: LLM) -> None:
    waiting = iter(PROMPTS[2:])
    llm.enqueue(PROMPTS[:2], greedy())
    seen = []
    for result in llm.as_completed():
        seen.append(result.prompt)
        llm.enqueue([prompt for prompt in [next(waiting, None)] if prompt is not None], greedy())
    assert sorted(str(prompt) for prompt in seen) == PROMPTS


def test_a_loop_that_is_left_loses_nothing(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, greedy())
    llm.enqueue(PROMPTS, greedy())
    first = next(llm.as_completed())
    others = llm.wait_for_completion(use_tqdm=False)
    assert sorted(written([first, *others])) == sorted(written(expected))
    assert len(others) == 5


def test_a_bad_prompt_is_one_error_result(llm: LLM) -> None:
    llm.enqueue(["good", 7, "x" * 500], greedy())
    good, *bad = llm.wait_for_completion()
    assert good.error is None
    assert ["prompt=7" in str(bad[0].error), "max_model_len" in str(bad[1].error)] == [True, True]
    with pytest.raises(ValueError, match="temperature=-1"):
        llm.enqueue("a", {"temperature": -1})


@pytest.mark.parametrize("step", [2, 6])
def test_what_ctrl_c_interrupts_is_kept_and_goes_on(step: int, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [greedy(2 + 4 * index) for index in range(6)]
    expected = llm.generate(PROMPTS, lengths)
    llm.enqueue(PROMPTS, lengths)
    with monkeypatch.context() as patch:
        interrupt_step(llm, step, patch)
        with pytest.raises(KeyboardInterrupt):
            llm.wait_for_completion()
    results = llm.wait_for_completion()
    assert [result.prompt for result in results] == PROMPTS
    assert written(results) == written(expected)


def test_a_loop_goes_on_after_ctrl_c(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.enqueue(PROMPTS, greedy())
    seen = []
    with monkeypatch.context() as patch:
        interrupt_step(llm, 7, patch)
        with pytest.raises(KeyboardInterrupt):
            for result in llm.as_completed():
                seen.append(result.prompt)
    assert 0 < len(seen) < 6
    seen += [result.prompt for result in llm.as_completed()]
    assert sorted(str(prompt) for prompt in seen) == PROMPTS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_reset_forgets_what_is_enqueued(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.enqueue(PROMPTS, greedy())
    with pytest.raises(ValueError, match=r"6 enqueued prompts .* reset\(\)"):
        llm.generate("a")
    with monkeypatch.context() as patch:
        interrupt_step(llm, 2, patch)
        with pytest.raises(KeyboardInterrupt):
            llm.wait_for_completion()
    llm.reset()
    assert not llm._live_engine().has_unfinished() and llm.wait_for_completion() == []
    assert llm.generate("a", greedy())[0].error is None


def test_an_engine_that_fails_loses_what_it_ran_and_keeps_what_was_done(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = llm.enqueue("a", greedy(1))
    llm.enqueue("b", greedy(50))
    engine = llm._live_engine()
    step = engine.step

    def broken() -> list[RequestOutput]:
        outputs = step()
        if not outputs:
            raise RuntimeError("device lost")
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            llm.wait_for_completion()
    assert [result.request_id for result in llm.wait_for_completion()] == done
    llm.enqueue("c", greedy())
    assert len(llm.wait_for_completion()) == 1


def test_other_results_than_there_are_cannot_be_waited_for(llm: LLM) -> None:
    with pytest.raises(ValueError, match="output_type="):
        llm.wait_for_completion(output_type=PoolingRequestOutput)
