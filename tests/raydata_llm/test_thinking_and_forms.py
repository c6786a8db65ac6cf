"""Models that think: outputs follow their form from the end of their thinking on (`reasoning_parser`)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm import LLM, SamplingParams, StructuredOutputsParams
from raydata_llm.engine.request import RequestOutput
from raydata_llm.engine.thinking import Markers, ThinkingEnd
from tests.engine.number_tokenizer import NumberTokenizer
from tests.engine.optimism import optimistic_admission
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

# Of the tokenizer's special tokens, the same in every text.
THINK, END = 3, 4
FORM = r"[a-f]{3}-\d\d"
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 128,
    "reasoning_config": {"reasoning_start_str": "<|user|>", "reasoning_end_str": "<|assistant|>"},
}


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return str(save_tokenizer(folder))


@pytest.fixture(scope="module", params=[0, 2], ids=["read at once", "launched ahead"])
def llm(request: pytest.FixtureRequest, model_folder: str) -> Iterator[LLM]:
    with LLM(model_folder, reasoning_parser="qwen3", steps_ahead=request.param, **SETTINGS) as made:
        yield made


def ask(llm: LLM, prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
    asked = SamplingParams(**({"temperature": 1.0, "seed": 1, "max_tokens": 40} | params))
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)


def form(regex: str = FORM) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(regex=regex)}


def text_of(llm: LLM, token_ids: list[int]) -> str:
    return str(llm.get_tokenizer().decode(token_ids, skip_special_tokens=True))


def test_the_form_begins_where_thinking_ends(llm: LLM) -> None:
    [result] = ask(llm, [[1, 50, 60, THINK]], thinking_token_budget=7, n=4, **form())
    assert len({tuple(output.token_ids) for output in result.outputs}) == 4
    for output in result.outputs:
        before, after = output.token_ids[:8], output.token_ids[8:]
        assert END not in before[:7] and before[7] == END and output.finish_reason == "stop"
        assert re.fullmatch(FORM, text_of(llm, after))
    free = ask(llm, [[1, 50, 60, THINK]], thinking_token_budget=7, n=4)[0]
    assert [one.token_ids[:8] for one in free.outputs] == [one.token_ids[:8] for one in result.outputs]


def test_a_prompt_in_which_thinking_has_ended_is_answered_in_the_form(llm: LLM) -> None:
    ended, unopened = ask(llm, [[1, 50, THINK, 60, END, 9], [1, 50, 60]], **form())
    assert re.fullmatch(FORM, ended.outputs[0].text)
    # A model that opens its thinking itself: nothing says that it will not.
    assert unopened.outputs[0].token_ids == ask(llm, [[1, 50, 60]])[0].outputs[0].token_ids


def test_without_a_parser_the_form_is_followed_from_the_start(model_folder: str) -> None:
    with LLM(model_folder, **SETTINGS) as llm:
        for result in ask(llm, [[1, 50, 60, THINK], [1, 50, 60]], **form()):
            assert re.fullmatch(FORM, result.outputs[0].text)


def test_rows_that_think_and_others_share_a_batch_and_are_sent_back_to_wait(model_folder: str, llm: LLM) -> None:
    prompts = [[1, 40 + row, *([THINK] if row % 3 else [THINK, 50, END])] for row in range(24)]
    expected = ask(llm, prompts, thinking_token_budget=9, **form("[a-f]{20}"))
    settings = SETTINGS | {"num_gpu_blocks_override": 30, "block_size": 8, "max_model_len": 64}
    with optimistic_admission(), LLM(model_folder, reasoning_parser="qwen3", **settings) as small:
        got = ask(small, prompts, thinking_token_budget=9, **form("[a-f]{20}"))
        assert small._live_engine().stats().num_preemptions > 0
    assert [one.outputs[0].token_ids for one in got] == [one.outputs[0].token_ids for one in expected]
    for prompt, one in zip(prompts, got, strict=True):
        written = list(one.outputs[0].token_ids)
        answer = written if END in prompt else written[written.index(END) + 1 :]
        assert re.fullmatch("[a-f]{20}", text_of(llm, answer))


def test_what_names_no_markers_is_an_error_of_the_rows_that_need_them(model_folder: str) -> None:
    with LLM(model_folder, reasoning_parser="granite", **SETTINGS | {"reasoning_config": {}}) as llm:
        assert ask(llm, [[1, 50]])[0].error is None
        error = ask(llm, [[1, 50]], **form())[0].error
        assert error is not None and "reasoning_parser='granite' is not known: give one of deepseek_r1, " in error
    with pytest.raises(ValueError, match="reasoning_parser=5 is not valid"):
        LLM(model_folder, reasoning_parser=5, **SETTINGS)


@pytest.mark.parametrize(
    ("prompt", "written", "over_after"),
    [([1, 700], [4, 701, 702], 3), ([701, 702], [], 0), ([1], [702, 701, 701, 702], 4), ([700, 701], [702], None)],
)
def test_the_end_is_found_in_prompt_or_output(prompt: list[int], written: list[int], over_after: int | None) -> None:
    thinking = ThinkingEnd(Markers([700], [701, 702]), np.array(prompt, dtype=np.int32))
    over = [thinking.is_over]
    for token in written:
        thinking.advance(token)
        over.append(thinking.is_over)
    assert over.index(True) == over_after if over_after is not None else not any(over)


def test_markers_are_the_parsers_unless_they_are_given() -> None:
    class Texts(NumberTokenizer):
        def encode(self, text: str, /, *, add_special_tokens: bool) -> Any:
            return [len(text)]

    given = {"reasoning_start_str": "12345"}
    assert Markers.of(Texts(), {}, "mistral") == Markers([7], [8])
    assert Markers.of(Texts(), {"reasoning_parser": "seed_oss"}) == Markers([12], [13])
    assert Markers.of(Texts(), given, "mistral") == Markers([5], [8])
