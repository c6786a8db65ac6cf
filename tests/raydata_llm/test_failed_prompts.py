"""A prompt that cannot be run: reading its outputs says why, and `on_error="raise"` stops the call as vLLM does."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import LLM, CompletionOutput, PromptError, RequestOutput, SamplingParams, StructuredOutputsParams
from raydata_llm.llm_metrics import Counter
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer, save_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 4}
TOO_LONG = "x " * 200


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDATA_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_pooling_model(folder, "bert", "AutoModel", pad_token_id=0)
    return save_pair_tokenizer(folder)


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), **SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def strict(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), on_error="raise", **SETTINGS) as made:
        yield made


def test_reading_a_bad_prompts_output_says_its_error(llm: LLM) -> None:
    bad, good = llm.generate([TOO_LONG, "hello"], GREEDY)
    for read in (lambda: bad.outputs[0].text, lambda: bad.outputs[-1], lambda: bad.outputs.pop()):
        with pytest.raises(PromptError, match=r"max_model_len=64 leaves no room.*on_error='raise'"):
            read()
    assert isinstance(PromptError("x"), ValueError) and not issubclass(PromptError, IndexError)
    assert bad.outputs == [] and len(bad.outputs) == 0 and list(bad.outputs) == [] and bad.outputs[:1] == []
    assert len(good.outputs[0].token_ids) == 3


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copied_result_still_says_its_error(way: Callable[[Any], Any]) -> None:
    with pytest.raises(PromptError, match="too odd"):
        way(RequestOutput("0", [1], error="ValueError: too odd")).outputs[0]


def test_a_failed_result_becomes_a_dict() -> None:
    made = dataclasses.asdict(RequestOutput("0", [1], error="ValueError: too odd"))
    assert made["outputs"] == [] and made["error"] == "ValueError: too odd"


def test_beams_of_a_bad_prompt_say_its_error(llm: LLM) -> None:
    bad, good = llm.beam_search([TOO_LONG, "hello"], {"beam_width": 2, "max_tokens": 2})
    with pytest.raises(PromptError, match="max_model_len=64"):
        print(bad.sequences[0].text)
    assert bad.sequences == [] and len(good.sequences) == 2


def test_every_value_of_a_failed_pooled_prompt_says_its_error(encoder_folder: Path) -> None:
    llm = LLM(str(encoder_folder))
    [embedded] = llm.embed([{"prompt_token_ids": []}])
    [encoded] = llm.encode([{"prompt_token_ids": []}])
    [scored] = llm.score("hello", [{"prompt_token_ids": []}])
    for result, name in ((embedded, "embedding"), (encoded, "data"), (scored, "score")):
        assert result.error is not None and not result.outputs
        with pytest.raises(PromptError, match="prompt_token_ids is empty"):
            getattr(result.outputs, name)
        assert not hasattr(result.outputs, "__array__") and "prompt_token_ids is empty" in repr(result.outputs)


def calls_of(llm: LLM) -> dict[str, Callable[[list[Any]], Any]]:
    return {
        "generate": lambda prompts: llm.generate(prompts, GREEDY),
        "enqueue": lambda prompts: llm.enqueue(prompts, GREEDY),
        "beam_search": lambda prompts: llm.beam_search(prompts, {"beam_width": 2, "max_tokens": 2}),
        "chat": lambda prompts: llm.chat([[{"role": "user", "content": one}] for one in prompts], GREEDY),
    }


@pytest.mark.parametrize("call", ["generate", "enqueue", "beam_search", "chat"])
def test_the_first_bad_prompt_can_stop_the_call(strict: LLM, call: str) -> None:
    with pytest.raises(PromptError, match=r"prompts\[1\] failed: ValueError: .*max_model_len=64"):
        calls_of(strict)[call](["hello", TOO_LONG, "world", TOO_LONG])
    # Nothing is left of it, and the next call works.
    assert strict.wait_for_completion() == []
    assert len(strict.generate(["hello", "world"], GREEDY)) == 2


def test_no_prompt_is_run_before_a_bad_one_is_found(strict: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def steps() -> float:
        named = {metric.name: metric for metric in strict.get_metrics() if isinstance(metric, Counter)}
        return named["raydata_llm:steps"].value

    before = steps()
    with pytest.raises(PromptError, match=r"prompts\[600\] failed"), caplog.at_level(logging.WARNING):
        strict.generate(["hello"] * 600 + [TOO_LONG], GREEDY)
    assert steps() == before and not caplog.messages


def test_an_error_that_only_running_shows_stops_the_call_too(strict: LLM) -> None:
    wrong = SamplingParams(max_tokens=2, structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(PromptError, match=r"prompts\[1\] failed: ValueError: .*regex"):
        strict.generate(["hello", "world"], [GREEDY, wrong])
    assert len(strict.generate("hello", GREEDY)) == 1


def test_a_bad_pooled_prompt_can_stop_the_call(encoder_folder: Path) -> None:
    llm = LLM(str(encoder_folder), on_error="raise")
    with pytest.raises(PromptError, match=r"prompts\[1\] failed: ValueError: prompt_token_ids is empty"):
        llm.embed(["hello", {"prompt_token_ids": []}, "world"])
    assert [output.error for output in llm.embed(["hello", "world"])] == [None, None]


def test_what_on_error_may_be(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="on_error='ignore' is not valid: choose 'return' or 'raise'"):
        LLM(str(model_folder), on_error="ignore", **SETTINGS)  # type: ignore[arg-type]


def test_results_are_made_by_vllms_keywords(caplog: pytest.LogCaptureFixture) -> None:
    output = CompletionOutput(index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=None)
    result = RequestOutput(
        request_id="1", prompt="", prompt_token_ids=[1], prompt_logprobs=None, outputs=[output], finished=True,
        encoder_prompt=None, example_of_a_later_field="x", another=1,
    )  # fmt: skip
    assert result.finished and result.outputs == [output] and not output.finished()
    assert not RequestOutput("1", [1], outputs=[output]).finished
    [warning] = caplog.messages
    assert "another, example_of_a_later_field" in warning and "encoder_prompt" not in warning
