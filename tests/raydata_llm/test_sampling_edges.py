"""Edges of sampling parameters, as tables: what comes out, and which field an error names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import LLM, FlatLogprobs, RequestOutputKind, SamplingParams
from raydata_llm.engine.request import CompletionOutput, RequestOutput
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

MAX_MODEL_LEN = 64
EOS = 2


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": MAX_MODEL_LEN}
    with LLM(str(save_tokenizer(folder)), **settings) as made:
        yield made


def generate(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    return llm.generate([prompt], SamplingParams(**({"temperature": 0.0} | params)), use_tqdm=False)[0]


def writing(llm: LLM, text: str, **params: Any) -> CompletionOutput:
    """The output of a row that is made to write `text`, one token after the other, then to go on with `.`."""
    tokens = llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
    [dot] = llm.get_tokenizer()(".", add_special_tokens=False)["input_ids"]
    grammar = f"start: {' '.join(f'<[{token}]>' for token in tokens)} <[{dot}]>~30"
    made = generate(
        llm, "hello", **({"max_tokens": 25, "structured_outputs": {"grammar": f"%llguidance {{}}\n{grammar}"}} | params)
    )
    assert made.error is None
    return made.outputs[0]


# What is written, the parameters, the text that comes out and the stop reason.
STOPS: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "over token borders": ("hello world", {"stop": "lo wo"}, "hel", "lo wo"),
    "kept in the output": ("hello world", {"stop": "lo wo", "include_stop_str_in_output": True}, "hello wo", "lo wo"),
    "the first of several": ("hello world", {"stop": ["rl", "wor", "absent"]}, "hello ", "wor"),
    "at the start": ("hello", {"stop": ["h"]}, "", "h"),
    "the whole": ("hello.", {"stop": "hello.", "include_stop_str_in_output": True}, "hello.", "hello."),
    "of bytes over four tokens": ("a🍵b", {"stop": "🍵"}, "a", "🍵"),
    "kept, of bytes": ("a🍵b", {"stop": "🍵", "include_stop_str_in_output": True}, "a🍵", "🍵"),
    "after unicode": ("naïve ☃ x", {"stop": "☃ x"}, "naïve ", "☃ x"),
    "one of its tokens writes more": ("the quick fox", {"stop": "qu"}, "the ", "qu"),
    "not before min_tokens": ("xyxyx", {"stop": "x", "min_tokens": 3}, "xyxy", "x"),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings(case: str, llm: LLM) -> None:
    text, params, expected, reason = STOPS[case]
    output = writing(llm, text, **params)
    assert (output.text, output.stop_reason, output.finish_reason) == (expected, reason, "stop")


def test_unicode_over_tokens_is_whole_in_the_text(llm: LLM) -> None:
    output = writing(llm, "é☃🍵", max_tokens=9)
    assert (output.text, len(output.token_ids)) == ("é☃🍵", 9)
    # Cut in the midst of a character: its bytes are no text yet.
    assert writing(llm, "é☃🍵", max_tokens=8).text == "é☃"


def test_one_token(llm: LLM) -> None:
    made = generate(llm, "hello", max_tokens=1, logprobs=0, prompt_logprobs=0)
    output = made.outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
    assert output.logprobs is not None and len(output.logprobs) == 1
    assert made.prompt_logprobs is not None and len(made.prompt_logprobs) == len(made.prompt_token_ids)


# A prompt's length, the parameters, and how many tokens come out; None: an error that names max_model_len.
LENGTHS: dict[str, tuple[int, dict[str, Any], int | None]] = {
    "room for one": (MAX_MODEL_LEN - 1, {"max_tokens": 9}, 1),
    "no room": (MAX_MODEL_LEN, {}, None),
    "too long": (MAX_MODEL_LEN + 9, {}, None),
    "cut to fit": (MAX_MODEL_LEN + 9, {"truncate_prompt_tokens": -1, "max_tokens": 9}, 1),
    "cut to two": (MAX_MODEL_LEN, {"truncate_prompt_tokens": 2, "max_tokens": 9}, 9),
    "up to the model's length": (MAX_MODEL_LEN - 5, {"max_tokens": None}, 5),
    "one token": (1, {"max_tokens": 3}, 3),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_prompt_lengths(case: str, llm: LLM) -> None:
    length, params, expected = LENGTHS[case]
    made = generate(llm, [7 + i % 50 for i in range(length)], ignore_eos=True, **params)
    if expected is None:
        assert made.error is not None and "max_model_len=64" in made.error and made.outputs == []
    else:
        assert made.error is None and len(made.outputs[0].token_ids) == expected


@pytest.mark.parametrize("prompt", [[], {"prompt_token_ids": []}], ids=str)
def test_an_empty_prompt_is_that_rows_error(prompt: Any, llm: LLM) -> None:
    bad, good = llm.generate([prompt, "hello"], SamplingParams(max_tokens=2), use_tqdm=False)
    assert bad.error is not None and "prompt_token_ids is empty" in bad.error
    assert good.error is None and good.outputs


def test_an_empty_text_is_the_token_that_begins_texts(llm: LLM) -> None:
    assert generate(llm, "").prompt_token_ids == [1]


def test_duplicates_draw_differently_and_seeded_ones_alike(llm: LLM) -> None:
    free = SamplingParams(temperature=1.0, max_tokens=8)
    drawn = [tuple(one.outputs[0].token_ids) for one in llm.generate(["hello"] * 6, free, use_tqdm=False)]
    assert len(set(drawn)) == 6
    seeded = SamplingParams(temperature=1.0, max_tokens=8, seed=4)
    assert len({tuple(one.outputs[0].token_ids) for one in llm.generate(["hello"] * 6, seeded, use_tqdm=False)}) == 1


def test_sixteen_outputs_of_a_prompt(llm: LLM) -> None:
    made = generate(llm, "hello", n=16, temperature=1.0, max_tokens=6, logprobs=1, ignore_eos=True)
    assert [output.index for output in made.outputs] == list(range(16))
    assert len({tuple(output.token_ids) for output in made.outputs}) == 16
    assert all(len(output.logprobs or ()) == 6 for output in made.outputs)


def test_an_end_token_beside_a_stop_token(llm: LLM) -> None:
    biased = {"logit_bias": {EOS: 1000.0}, "stop_token_ids": [EOS]}
    output = generate(llm, "hello", **biased).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason, output.text) == ([EOS], "stop", EOS, "")


def test_values_that_stand_for_others() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert (SamplingParams(logprobs=True).logprobs, SamplingParams(prompt_logprobs=True).prompt_logprobs) == (1, 1)
    made = SamplingParams.from_optional(temperature=None, top_k=-1, stop="x", seed=None)
    assert made == SamplingParams(stop=["x"])
    copy = made.clone()
    copy.temperature = 0.5
    assert made.temperature == 1.0 and copy != made


# Parameters that make no sense, and the field that the error names.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"logprobs": -2}, "logprobs"),
    ({"prompt_logprobs": 1.5}, "prompt_logprobs"),
    ({"logprob_token_ids": [-1]}, "logprob_token_ids"),
    ({"stop": [""]}, "stop"),
    ({"stop": "x", "detokenize": False}, "detokenize"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [5]}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {1: float("inf")}}, "logit_bias"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ({"extra_args": [1]}, "extra_args"),
    ({"skip_reading_prefix_cache": 1}, "skip_reading_prefix_cache"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": "json"}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "guided_decoding": {"regex": "a"}}, "guided_decoding"),
    ({"temprature": 1}, "temprature"),
    ({"flat_logprobs": 1}, "flat_logprobs"),
    ({"output_kind": "SOME"}, "output_kind"),
    ({"output_kind": 3}, "output_kind"),
    ({"stream_interval": 0}, "stream_interval"),
    ({"repetition_detection": 3}, "repetition_detection"),
    ({"repetition_detection": {"size": 3}}, "repetition_detection"),
    ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection.min_count"),
    ({"repetition_detection": {"max_pattern_size": -3}}, "repetition_detection.max_pattern_size"),
    ({"repetition_detection": {"min_pattern_size": 2, "min_count": 2}}, "repetition_detection.min_pattern_size"),
    ({"repetition_detection": {"max_pattern_size": 2.5, "min_count": 2}}, "repetition_detection.max_pattern_size"),
    ({"best_of": 3}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"logits_processors": [print]}, "logits_processors"),
    ({"prompt_logprob_token_ids": [[-3]]}, "prompt_logprob_token_ids"),
    ({"prompt_logprob_start": 3}, "prompt_logprob_start"),
    ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids"),
    ({"routed_experts_prompt_start": 3}, "routed_experts_prompt_start"),
    ({"watermarking": True}, "watermarking"),
    ({"n": True}, "n"),
    ({"seed": "x"}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"allowed_token_ids": [True]}, "allowed_token_ids"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"top_p": None, "min_p": -0.1}, "min_p"),
]


@pytest.mark.parametrize(("params", "field"), WRONG, ids=str)
def test_an_error_names_its_field(params: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"(^|\b){field}\b"):
        SamplingParams.from_mapping(params)


# What ends, at max_tokens=24, an output that is made to write xyxyxyxy..., and after how many tokens.
REPETITIONS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "of two tokens": ({"max_pattern_size": 4, "min_count": 3}, 6, "repetition_detected"),
    "of four at least": ({"max_pattern_size": 4, "min_pattern_size": 3, "min_count": 3}, 12, "repetition_detected"),
    "of one": ({"max_pattern_size": 1, "min_count": 2}, 24, None),
    "not looked for": ({"max_pattern_size": 0}, 24, None),
}


@pytest.mark.parametrize("case", REPETITIONS)
def test_repetitions(case: str, llm: LLM) -> None:
    params, length, reason = REPETITIONS[case]
    output = writing(llm, "xy" * 13, max_tokens=24, repetition_detection=params)
    assert (len(output.token_ids), output.stop_reason) == (length, reason)
    assert output.text == "xyxyxyxyxyxyxyxyxyxyxyxy"[:length]
    assert output.finish_reason == ("length" if reason is None else "stop")


def test_a_repetition_ends_nothing_before_min_tokens_and_stop_strings_go_before(llm: LLM) -> None:
    found = {"repetition_detection": {"max_pattern_size": 2, "min_count": 2}}
    assert len(writing(llm, "xy" * 9, min_tokens=7, **found).token_ids) == 8
    both = writing(llm, "xy" * 9, stop="yx", **found)
    assert (both.text, both.stop_reason) == ("x", "yx")


def test_flat_logprobs_say_what_the_others_say(llm: LLM) -> None:
    asked = {"logprobs": 2, "prompt_logprobs": 1, "max_tokens": 5, "ignore_eos": True}
    maps, flat = (generate(llm, "hello world", flat_logprobs=is_flat, **asked) for is_flat in (False, True))
    for listed, positions in (
        (maps.outputs[0].logprobs, flat.outputs[0].logprobs),
        (maps.prompt_logprobs, flat.prompt_logprobs),
    ):
        assert isinstance(positions, FlatLogprobs) and listed is not None
        assert list(positions) == [position or {} for position in listed]
        assert positions[-1] == listed[-1] and list(positions[1:3]) == listed[1:3]
        with pytest.raises(IndexError):
            positions[len(listed)]
        ends = positions.end_indices
        assert positions.start_indices == [0, *ends[:-1]] and ends[-1] == len(positions.token_ids)


def test_what_bears_on_streams_alone_changes_nothing(llm: LLM) -> None:
    streamed = SamplingParams(output_kind=RequestOutputKind.DELTA, stream_interval=4)
    assert streamed == SamplingParams() and streamed.to_mapping() == {}


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"])
def test_a_token_that_the_model_does_not_have_is_that_rows_error(name: str, llm: LLM) -> None:
    value: Any = {9999: 1.0} if name == "logit_bias" else [9999]
    bad, good = llm.generate(["hello"] * 2, [{name: value}, {"max_tokens": 2}], use_tqdm=False)
    assert bad.error is not None and f"{name} names token 9999" in bad.error
    assert good.error is None


@pytest.mark.parametrize("params", [one for one, _ in WRONG[:3]], ids=str)
def test_a_wrong_row_beside_good_ones(params: dict[str, Any], llm: LLM) -> None:
    bad, good = llm.generate(["hello"] * 2, [params, {"max_tokens": 2}], use_tqdm=False)
    assert bad.error is not None and next(iter(params)) in bad.error
    assert good.error is None


def test_parameters_may_be_changed_until_they_are_used(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    params.min_tokens = 20  # above max_tokens for now
    params.max_tokens = 30
    llm.enqueue("hello", params)
    params.max_tokens = 21
    llm.enqueue("hello", params)
    lengths = [len(result.outputs[0].token_ids) for result in llm.wait_for_completion(use_tqdm=False)]
    assert lengths == [30, 21], "what is enqueued has its own"
    params.max_tokens = 3
    with pytest.raises(ValueError, match="min_tokens=20 is not valid: it may not exceed max_tokens=3"):
        llm.generate("hello", params)
    with pytest.raises(AttributeError, match="temprature"):
        params.temprature = 1  # type: ignore[attr-defined]
