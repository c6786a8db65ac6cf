"""LLM: prompts of every form in, results in order out, errors as results, Ctrl-C, and freeing the device."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm import LLM, SamplingParams, generation
from raydata_llm.engine.engine_stats import EngineStats
from raydata_llm.engine.request import RequestOutput
from raydata_llm.llm_metrics import Counter, Gauge, Histogram
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "max_num_seqs": 8}


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
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), **SETTINGS) as made:
        yield made


def token_ids(results: list[RequestOutput]) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in results]


def test_every_form_of_prompt_gives_the_same_result(llm: LLM) -> None:
    ids = llm.get_tokenizer()("hello world")["input_ids"]
    forms: list[Any] = ["hello world", {"prompt": "hello world"}, {"prompt_token_ids": ids}, ids, tuple(ids)]
    forms += [np.array(ids), {"prompt_token_ids": np.array(ids), "prompt": "hello world"}]
    results = llm.generate(forms, GREEDY)
    assert [result.prompt_token_ids for result in results] == [ids] * len(forms)
    assert token_ids(results) == [token_ids(results)[0]] * len(forms)
    known = [result.prompt for result in results]
    assert known == ["hello world", "hello world", None, None, None, None, "hello world"]
    for form in forms:
        assert token_ids(llm.generate(form, GREEDY)) == token_ids(results[:1])


def test_texts_are_tokenised_as_asked(llm: LLM) -> None:
    whole = llm.get_tokenizer()("the quick brown fox")["input_ids"]

    def asked(prompts: Any, **tokenization: Any) -> list[list[int]]:
        results = llm.generate(prompts, GREEDY, tokenization_kwargs=tokenization)
        return [result.prompt_token_ids for result in results]

    assert asked(["the quick brown fox", whole], truncation=True, max_length=3) == [whole[:3], whole]
    assert asked("the quick brown fox", add_special_tokens=False) == [whole[1:]]
    # One place is left for an output.
    assert [len(ids) for ids in asked("x " * 500, truncation=True)] == [95]
    assert asked(["the quick brown fox"]) == [whole]
    llm.enqueue("the quick brown fox", GREEDY, tokenization_kwargs={"max_length": 2, "truncation": True})
    assert [one.prompt_token_ids for one in llm.wait_for_completion()] == [whole[:2]]
    with pytest.raises(ValueError, match=r"tokenization_kwargs\['padding'\] is not valid"):
        asked("x", padding=True)
    [bad] = llm.generate("\ud800", GREEDY, tokenization_kwargs={"truncation": True})
    assert bad.error is not None and bad.error.startswith("ValueError: prompt has half a character")


def test_arguments_of_vllms_methods_are_taken_or_refused_by_name(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    [plain] = llm.generate("hello", GREEDY)
    [asked] = llm.generate("hello", GREEDY, priority=[3], mm_processor_kwargs={})
    assert token_ids([asked]) == token_ids([plain])
    # As vLLM's, by position.
    [chat] = llm.chat(messages, GREEDY, False, None, priority=[3], chat_template_content_format="string")
    assert token_ids([chat]) == token_ids(llm.chat(messages, GREEDY))
    with pytest.raises(ValueError, match="mm_processor_kwargs is not supported, as models of text are run"):
        llm.generate("hello", GREEDY, mm_processor_kwargs={"num_crops": 4})
    with pytest.raises(ValueError, match="mm_processor_kwargs is not supported"):
        llm.chat(messages, GREEDY, mm_processor_kwargs={"num_crops": 4})
    with pytest.raises(ValueError, match="chat_template_content_format='list' is not valid: choose one of auto"):
        llm.chat(messages, GREEDY, chat_template_content_format="list")
    image, text = llm.generate([{"prompt": "hello", "multi_modal_data": {"image": "x"}}, "hello"], GREEDY)
    assert image.error == "ValueError: multi_modal_data is not supported, as models of text are run: leave it out"
    assert token_ids([text]) == token_ids([plain])


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_results_keep_the_order_of_more_prompts_than_are_tokenised_at_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_CHUNK", 4)
    prompts = [f"row {index}" for index in range(22)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + index % 3, ignore_eos=True) for index in range(22)]
    results = llm.generate(prompts, params)
    assert [result.prompt for result in results] == prompts
    assert [len(ids) for ids in token_ids(results)] == [1 + index % 3 for index in range(22)]
    assert len({result.request_id for result in results}) == 22


def test_output_text_is_the_decoded_tokens(llm: LLM) -> None:
    allowed = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, allowed_token_ids=(40, 41, 2))
    output = llm.generate("hello", allowed)[0].outputs[0]
    assert set(output.token_ids) == {40, 41, 2}
    assert output.finish_reason == "length"
    assert output.text == llm.get_tokenizer().decode(output.token_ids, skip_special_tokens=True)
    silent = llm.generate("hello", SamplingParams(max_tokens=3, detokenize=False))[0].outputs[0]
    assert silent.text == "" and silent.token_ids and silent.finished()


def test_a_stop_string_is_cut_from_the_text_and_kept_in_the_tokens(llm: LLM) -> None:
    encode = llm.get_tokenizer().convert_tokens_to_ids
    params = {"allowed_token_ids": [encode("a"), encode("b")], "stop": "ab", "max_tokens": 64, "seed": 1}
    output = llm.generate("hello", {**params, "temperature": 100.0})[0].outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == "ab"
    assert "ab" not in output.text
    assert output.token_ids[-2:] == [encode("a"), encode("b")]


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    output = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, ignore_eos=True))[0]
    tokenizer = llm.get_tokenizer()
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == 4
    for position in logprobs:
        assert {token_id: logprob.decoded_token for token_id, logprob in position.items()} == {
            token_id: tokenizer.decode([token_id]) for token_id in position
        }


def test_bad_prompts_are_error_results_and_the_others_finish(llm: LLM) -> None:
    prompts: list[Any] = [
        "good",
        "x" * 500,
        7,
        None,
        {"text": "hello"},
        {"prompt": 3},
        {"prompt_token_ids": [1, "2"]},
        {"prompt_token_ids": [5_000_000_000]},
        {"prompt_token_ids": [-1]},
        {"prompt_token_ids": [2000]},
        {"prompt_token_ids": []},
        "\ud800",
        "good",
    ]
    results = llm.generate(prompts, GREEDY)
    assert len(results) == len(prompts)
    for result in results[1:-1]:
        assert result.outputs == [] and result.finished
        assert result.error is not None and "Error: " in result.error
    messages = [str(result.error) for result in results]
    assert "max_model_len=96 leaves no room" in messages[1]
    assert messages[2] == "ValueError: prompt=7 is a int: give text or token ids"
    assert "has the keys ['text']: give prompt, prompt_token_ids or prompt_embeds" in messages[4]
    assert "5000000000" in messages[7] and "below 2**31" in messages[7]
    assert messages[11].startswith("ValueError: prompt has half a character (a lone surrogate) at 0: '\\ud800'")
    assert results[0].error is None and token_ids([results[0]]) == token_ids([results[-1]])
    assert not llm._live_engine().has_unfinished()


@pytest.mark.parametrize("given", [{"stop": ["\ud800"]}, {"bad_words": ["a\udfff"]}, {"stop": "\ud800"}], ids=ascii)
def test_half_a_character_in_a_prompts_parameters_is_its_own_error(given: dict[str, Any], llm: LLM) -> None:
    good, bad = llm.generate(["good", "good"], [GREEDY, given])
    [name] = given
    assert good.error is None and bad.error is not None and f"ValueError: {name} has half a character" in bad.error
    with pytest.raises(ValueError, match=f"{name} has half a character"):
        llm.generate("good", given)


def test_half_a_character_in_a_conversation_is_its_own_error(llm: LLM) -> None:
    good, bad = llm.chat([[{"role": "user", "content": text}] for text in ("hi", "hi \ud800")], GREEDY)
    assert good.error is None and bad.error is not None and "prompt has half a character" in bad.error


def test_failed_prompts_are_told_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    llm.generate(["good", 7, 8], GREEDY)
    assert "2 of 3 prompts failed; the first: ValueError: prompt=7" in caplog.text


def test_sampling_params_may_be_none_one_or_a_list(llm: LLM) -> None:
    one = llm.generate(["a", "b"], {"max_tokens": 3, "ignore_eos": True})
    assert [len(ids) for ids in token_ids(one)] == [3, 3]
    each = llm.generate(["a", "b"], [{"max_tokens": 2, "ignore_eos": True}, GREEDY])
    assert [len(ids) for ids in token_ids(each)] == [2, 6]
    default = llm.generate("a")[0].outputs[0]
    assert len(default.token_ids) <= 16


def test_sampling_params_wrong_for_all_raise_and_wrong_for_one_are_its_error(llm: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ValueError, match="temperature=-1"):
        llm.generate(["a", "b"], {"temperature": -1})
    with pytest.raises(ValueError, match="sampling_params='greedy' is a str"):
        llm.generate("a", "greedy")  # type: ignore[arg-type]
    results = llm.generate(["a", "b"], [{"temperature": -1}, GREEDY])
    assert "temperature=-1" in str(results[0].error) and results[1].error is None


def test_defaults_come_from_the_models_generation_config(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 7, "max_new_tokens": 3})
    )
    with LLM(str(folder), **SETTINGS) as llm:
        expected = SamplingParams(temperature=0.5, top_k=7, max_tokens=3)
        assert llm.get_default_sampling_params() == expected
        assert len(llm.generate("a", {"ignore_eos": True})[0].outputs[0].token_ids) == 3
    with LLM(str(folder), generation_config="vllm", **SETTINGS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
    with LLM(str(folder), override_generation_config={"temperature": 0.0, "max_new_tokens": 4}, **SETTINGS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, top_k=7, max_tokens=4)
        assert len(llm.generate("a", {"ignore_eos": True})[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("wrong", [{"temprature": 1}, {"temperature": -1}, {"max_new_tokens": 0}, "greedy"], ids=str)
def test_a_wrong_override_of_the_generation_config_is_named(wrong: Any, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"override_generation_config=.* is not valid"):
        LLM(str(model_folder), override_generation_config=wrong, **SETTINGS)


def test_processed_logprobs_are_a_setting(model_folder: Path) -> None:
    asked = SamplingParams(temperature=0.5, top_k=1, logprobs=1, prompt_logprobs=0, max_tokens=3, ignore_eos=True)
    with LLM(str(model_folder), logprobs_mode="processed_logprobs", **SETTINGS) as llm:
        output = llm.generate("hello", asked, use_tqdm=False)[0]
        [raw] = llm.beam_search("hello", {"beam_width": 1, "max_tokens": 1})
    assert output.outputs[0].cumulative_logprob == pytest.approx(0.0, abs=1e-6), "one token is left to each draw"
    assert raw.sequences[0].cum_logprob < -0.1, "beams are ranked by the model's own"
    assert output.prompt_logprobs is not None and output.prompt_logprobs[1] is not None
    assert next(iter(output.prompt_logprobs[1].values())).logprob < -0.1, "a prompt is not drawn"
    with pytest.raises(ValueError, match="logprobs_mode='raw_logits' is not valid: choose one of raw_logprobs"):
        LLM(str(model_folder), logprobs_mode="raw_logits", **SETTINGS)


def test_noise_depends_on_seed_prompt_and_occurrence_only(model_folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    with LLM(str(model_folder), **SETTINGS) as llm:
        alone = token_ids(llm.generate(["a", "a", "b"], params))
        assert alone[0] != alone[1]
    with LLM(str(model_folder), **SETTINGS) as llm:
        crowd = token_ids(llm.generate(["c", "b", "d", "a", "a"], params))
        assert [crowd[3], crowd[4], crowd[1]] == alone
        seeded = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=5)
        first, second = token_ids(llm.generate(["a", "a"], seeded))
        assert first == second
        assert first not in alone


def test_asking_again_draws_anew_but_greedily_writes_the_same(model_folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    with LLM(str(model_folder), **SETTINGS) as llm:
        calls = token_ids(llm.generate("a", params)) + token_ids(llm.generate("a", params))
        assert token_ids(llm.generate("a", GREEDY)) == token_ids(llm.generate("a", GREEDY))
    with LLM(str(model_folder), **SETTINGS) as llm:
        assert token_ids(llm.generate(["a", "a"], params)) == calls
    assert calls[0] != calls[1]


def test_n_outputs_differ(llm: LLM) -> None:
    outputs = llm.generate("a", SamplingParams(temperature=1.0, max_tokens=8, n=3, ignore_eos=True))[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in outputs}) == 3


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    one = llm.chat(conversation, GREEDY)
    assert one[0].prompt == "<s><|user|>hi</s><|assistant|>"
    assert one[0].prompt_token_ids.count(1) == 1
    several = llm.chat([conversation, [*conversation, {"role": "assistant", "content": "ho"}]], GREEDY)
    assert token_ids(several[:1]) == token_ids(one)
    assert several[1].prompt == "<s><|user|>hi</s><|assistant|>ho</s><|assistant|>"


def test_chat_options_reach_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    continued = llm.chat(conversation, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert str(continued[0].prompt).endswith("<|assistant|>ho")
    assert llm.chat(conversation, GREEDY, chat_template="{{ messages[0].content }}")[0].prompt == "hi"
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert "look" in str(llm.chat(conversation, GREEDY, tools=tools)[0].prompt)
    assert "mood:glad" in str(llm.chat(conversation, GREEDY, chat_template_kwargs={"mood": "glad"})[0].prompt)
    with pytest.raises(ValueError, match="continue_final_message=True needs add_generation_prompt=False"):
        llm.chat(conversation, GREEDY, continue_final_message=True)


def test_a_bad_conversation_is_an_error_result(llm: LLM) -> None:
    good = [{"role": "user", "content": "hi"}]
    results = llm.chat([good, "hi", [{"role": "clown", "content": "hi"}], [{"content": "hi"}], None, good], GREEDY)
    assert [result.error is None for result in results] == [True, False, False, False, False, True]
    assert "no clowns" in str(results[2].error)
    assert token_ids(results[:1]) == token_ids(results[-1:])


def test_chat_without_a_template_raises(model_folder: Path, tmp_path: Path) -> None:
    plain = save_tokenizer(tmp_path / "tokenizer", chat_template=None)
    with (
        LLM(str(model_folder), tokenizer=str(plain), **SETTINGS) as llm,
        pytest.raises(ValueError, match="chat_template=None"),
    ):
        llm.chat([{"role": "user", "content": "hi"}])


def test_without_tokenizer_ids_go_in_and_out(model_folder: Path, llm: LLM) -> None:
    with LLM(str(model_folder), skip_tokenizer_init=True, **SETTINGS) as bare:
        result = bare.generate([{"prompt_token_ids": [5, 6, 7]}], GREEDY)[0]
        assert result.outputs[0].text == ""
        assert token_ids([result]) == token_ids(llm.generate([[5, 6, 7]], GREEDY))
        with pytest.raises(ValueError, match=r"prompts\[1\] is text, but skip_tokenizer_init=True"):
            bare.generate([[5, 6], "hello"], GREEDY)
        with pytest.raises(ValueError, match="skip_tokenizer_init=True left the tokenizer out"):
            bare.chat([{"role": "user", "content": "hi"}])
        stopped = bare.generate([[5, 6]], {"stop": "x"})[0]
        assert "needs a tokenizer" in str(stopped.error)


def test_a_ready_tokenizer_is_taken(model_folder: Path, llm: LLM) -> None:
    with LLM(str(model_folder), tokenizer=llm.get_tokenizer(), **SETTINGS) as other:
        assert other.get_tokenizer() is llm.get_tokenizer()


def test_wrong_settings_are_named_before_anything_is_loaded(model_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_model_length=5 is not an argument of LLM: did you mean max_model_len"):
        LLM("/no/such/model", max_model_length=5)
    with pytest.raises(ValueError, match=r"^tokeniser='t' is not an argument of LLM: did you mean tokenizer\?"):
        LLM("/no/such/model", tokeniser="t")
    with pytest.raises(ValueError, match=r"^engine_kwargs={.*} is not an argument of LLM: give its entries one by one"):
        LLM("/no/such/model", engine_kwargs={"max_model_len": 5})
    with pytest.raises(ValueError, match="tokenizer='t' is not valid with skip_tokenizer_init=True"):
        LLM("/no/such/model", tokenizer="t", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match=r"^model='/no/such/model' not found"):
        LLM("/no/such/model")
    with pytest.raises(ValueError, match=r"^tokenizer='/no/such/tokenizer' not found"):
        LLM(str(model_folder), tokenizer="/no/such/tokenizer")


def test_a_damaged_file_is_not_called_a_missing_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"weight file '.*' is damaged or not a safetensors file"):
        LLM(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is not valid JSON"):
        LLM(str(folder))
    gguf = tmp_path / "model.gguf"
    gguf.write_text("<html>")
    with pytest.raises(ValueError, match=r"model.gguf' is damaged or not a GGUF file"):
        LLM(str(gguf))


def test_progress_counts_prompts_and_speed(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, desc: str) -> None:
            self.total, self.desc, self.done, self.postfix, self.closed = total, desc, 0, "", False
            bars.append(self)

        def set_postfix_str(self, postfix: str, refresh: bool) -> None:
            self.postfix = postfix

        def update(self, count: int) -> None:
            self.done += count

        def close(self) -> None:
            self.closed = True

    llm.generate(["a", 7, "b"], GREEDY, use_tqdm=Bar)
    (bar,) = bars
    assert (bar.total, bar.done, bar.closed) == (3, 3, True)
    assert "input: " in bar.postfix and "output: " in bar.postfix and "tok/s" in bar.postfix
    llm.generate("a", GREEDY)
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    llm.generate("a", GREEDY)
    drawn = capsys.readouterr().err
    assert "Processed prompts" in drawn and "tok/s" in drawn
    llm.generate("a", GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def interrupt_after(llm: LLM, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    engine = llm._live_engine()
    step = engine.step
    whole: list[bool] = []

    def counted_step() -> list[RequestOutput]:
        if len(whole) == num_steps:
            signal.raise_signal(signal.SIGINT)
        outputs = step()
        whole.append(True)
        return outputs

    monkeypatch.setattr(engine, "step", counted_step)
    return whole


def test_an_interrupted_call_returns_what_is_done_and_leaves_the_llm_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = token_ids(llm.generate(["a", "b"], GREEDY))
    params = [
        SamplingParams(temperature=0.0, max_tokens=2 if index == 5 else 60, ignore_eos=True) for index in range(8)
    ]
    with monkeypatch.context() as patch:
        whole = interrupt_after(llm, 5, patch)
        results = llm.generate([f"row {index}" for index in range(8)], params)
        assert len(whole) == 6
    assert [result.prompt for result in results] == [f"row {index}" for index in range(8)]
    assert len(results[5].outputs[0].token_ids) == 2 and results[5].error is None
    for result in [*results[:5], *results[6:]]:
        assert result.finished and result.outputs == [] and "interrupted before" in str(result.error)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm._live_engine().has_unfinished()
    assert token_ids(llm.generate(["a", "b"], GREEDY)) == expected


def test_a_second_ctrl_c_raises_and_leaves_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient_step() -> list[RequestOutput]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(llm._live_engine(), "step", impatient_step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY)
    assert llm.generate("a", GREEDY)[0].error is None


def test_steps_in_flight_at_ctrl_c_do_not_reach_the_next_call(
    model_folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = token_ids(llm.generate(["a", "b"], GREEDY))
    with LLM(str(model_folder), steps_ahead=2, **SETTINGS) as ahead:
        with monkeypatch.context() as patch:
            interrupt_after(ahead, 4, patch)
            ahead.generate(["c", "d", "e"], {"max_tokens": 50, "temperature": 0.0, "ignore_eos": True})
        assert token_ids(ahead.generate(["a", "b"], GREEDY)) == expected


def test_an_engine_failure_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_step() -> list[RequestOutput]:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(llm._live_engine(), "step", broken_step)
        with pytest.raises(RuntimeError, match="device lost"):
            llm.generate(["a", "b"], GREEDY)
    assert not llm._live_engine().has_unfinished()
    assert len(llm.generate(["a"], GREEDY)) == 1


def test_ctrl_c_in_a_script_ends_the_call_and_nothing_else(model_folder: Path) -> None:
    script = f"""
import sys
from raydata_llm import LLM
class Bar:
    def __init__(self, **_): pass
    def set_postfix_str(self, *_, **__): pass
    def update(self, count): print("running", flush=True)
    def close(self): pass
with LLM({str(model_folder)!r}, num_threads=1, **{SETTINGS!r}) as llm:
    results = llm.generate(["a"] * 20_000, {{"max_tokens": 4, "ignore_eos": True}}, use_tqdm=Bar)
    print("done", sum(result.error is None for result in results), "of", len(results), flush=True)
    after = llm.generate("a", {{"max_tokens": 2, "ignore_eos": True}}, use_tqdm=False)
    print("usable", len(after[0].outputs[0].token_ids), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    done = re.search(r"done (\d+) of 20000", out)
    assert done is not None and 0 < int(done[1]) < 20_000
    assert "usable 2" in out and process.returncode == 0, err


def test_metrics_are_vllms_kinds_with_the_engines_figures(model_folder: Path) -> None:
    with LLM(str(model_folder), **SETTINGS) as llm:
        llm.generate(["a", "b"], GREEDY)
        metrics = llm.get_metrics()
    values = {metric.name: metric.value for metric in metrics if isinstance(metric, Counter | Gauge)}
    assert len(values) == len(dataclasses.fields(EngineStats)) == len(metrics) - 2  # and two histograms
    assert values["raydata_llm:output_tokens"] == 12 and values["raydata_llm:prompt_tokens"] == 4
    assert values["raydata_llm:running_rows"] == values["raydata_llm:waiting_rows"] == 0
    assert {type(metric) for metric in metrics} == {Counter, Gauge, Histogram}
    assert metrics[0].labels == {"model_name": str(model_folder)}


def test_a_reset_prefix_cache_is_empty(model_folder: Path) -> None:
    long = "the quick brown fox " * 6
    with LLM(str(model_folder), **{**SETTINGS, "block_size": 8}) as llm:
        cached = [llm.generate(long, GREEDY)[0].num_cached_tokens for _ in range(2)]
        llm.reset_prefix_cache()
        assert cached[0] == 0 < cached[1]
        assert llm.generate(long, GREEDY)[0].num_cached_tokens == 0


def test_shutdown_frees_the_engine_and_can_be_repeated(model_folder: Path) -> None:
    llm = LLM(str(model_folder), **SETTINGS)
    llm.generate("a", GREEDY)
    llm.reset_prefix_cache()
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(RuntimeError, match="this LLM was shut down"):
        llm.generate("a", GREEDY)


def test_importing_the_class_imports_no_torch() -> None:
    script = (
        "import sys; from raydata_llm import LLM; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
