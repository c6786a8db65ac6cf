"""LLM.beam_search: transformers' texts, prompts of every form, errors as results, mistakes named, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm import LLM, BeamSearchOutput, BeamSearchParams, LoRARequest, SamplingParams, StructuredOutputsParams
from raydata_llm.engine.beam_search import BeamSearch
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.grammar import GrammarCompiler
from tests.engine.lora_adapters import adapter_pairs, save_adapter
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer, save_tokenizer

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "max_num_seqs": 16}
# So many that beams come upon them.
ENDS = [2, *range(100, 140)]
PARAMS = BeamSearchParams(beam_width=4, max_tokens=8)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama", vocab_size=331, eos_token_id=ENDS), made)
    return save_tokenizer(made)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SETTINGS) as made:
        yield made


def tokens(outputs: list[BeamSearchOutput]) -> list[list[list[int]]]:
    return [[sequence.tokens for sequence in output.sequences] for output in outputs]


def transformers_beams(
    model: Any,
    prompt: list[int],
    params: BeamSearchParams,
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None,
) -> list[list[int]]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            pad_token_id=0,
            prefix_allowed_tokens_fn=allowed,
        )
    rows: list[list[int]] = found.tolist()
    return rows


def test_the_texts_are_those_of_transformers(folder: Path, llm: LLM) -> None:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    params = BeamSearchParams(beam_width=4, max_tokens=10, rules="transformers", include_stop_str_in_output=True)
    prompts = ["hello world", "the quick brown fox", "jumps over the lazy dog", "a"]
    tokenizer = llm.get_tokenizer()
    reasons = set()
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        expected = transformers_beams(model, tokenizer(prompt)["input_ids"], params)
        # What comes after an end token is padding.
        ends = [next((at for at, token_id in enumerate(row, 1) if token_id in ENDS), None) for row in expected]
        written = [row[:end] for row, end in zip(expected, ends, strict=True)]
        assert [sequence.tokens for sequence in output.sequences] == written
        # transformers shows the part of a character that a beam may end in.
        texts = [tokenizer.decode(row).rstrip("\ufffd") for row in written]
        assert [str(sequence.text).rstrip("\ufffd") for sequence in output.sequences] == texts
        assert texts[0].startswith(f"<s>{prompt}")
        reasons |= {sequence.finish_reason for sequence in output.sequences}
    assert reasons == {"stop", "length"}, "both ends must be met"


FORMS: dict[str, dict[str, Any]] = {
    "regex": {"regex": r"(the|fox|[a-f]{2,6})( (dog|[g-k]+))?"},
    "choice": {"choice": ["hello", "hello world", "world", "quick"]},
    "json": {
        "json": {"type": "object", "properties": {"a": {"enum": [1, 2, "x"]}}, "required": ["a"]},
        "disable_any_whitespace": True,
        "disable_additional_properties": True,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_beams_of_a_form_are_those_of_transformers_with_the_same_tokens_allowed(
    form: str, folder: Path, llm: LLM
) -> None:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    structured = StructuredOutputsParams(**FORMS[form])
    params = BeamSearchParams(beam_width=4, max_tokens=14, rules="transformers", structured_outputs=structured)
    tokenizer = llm.get_tokenizer()
    compiler = GrammarCompiler(tokenizer, 331, tuple(ENDS))
    make_guide = compiler.compile(structured, 1).result()
    prompts = ["hello world", "the quick brown fox", "a"]
    # In full batches, chunks of which another prompt's beams are part.
    outputs = llm.beam_search(prompts, params)
    endings = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer(prompt)["input_ids"]

        def allowed(_: int, row: torch.Tensor, num_prompt: int = len(ids)) -> list[int]:
            """From the start, by what is written, as no beam of the engine's is."""
            written = [token_id for token_id in row[num_prompt:].tolist() if token_id not in (0, *ENDS)]
            guide = make_guide()
            assert guide.matcher.try_consume_tokens(written) == len(written)
            words = np.zeros((1, 11), dtype=np.int32)
            guide.fill(words, 0)
            return [
                int(bit) for bit in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")) if bit < 331
            ]

        expected = transformers_beams(model, ids, params, allowed)
        ends = [next((at for at, token_id in enumerate(row, 1) if token_id in ENDS), None) for row in expected]
        assert [one.tokens for one in output.sequences] == [row[:end] for row, end in zip(expected, ends, strict=True)]
        for sequence in output.sequences:
            assert sequence.text is not None
            written = sequence.text.removeprefix(f"<s>{prompt}")
            endings.add(sequence.finish_reason)
            if sequence.finish_reason == "stop" and form == "json":
                assert json.loads(written)["a"] in (1, 2, "x")
            elif sequence.finish_reason == "stop":
                assert re.fullmatch(FORMS[form].get("regex") or "|".join(FORMS[form]["choice"]), written)
    compiler.shutdown()
    assert "stop" in endings


def test_beams_of_a_form_under_vllms_rules(llm: LLM) -> None:
    [output] = llm.beam_search(
        "hello", {"beam_width": 4, "max_tokens": 20, "structured_outputs": {"choice": ["ab", "ba"]}}
    )
    assert {str(one.text).removeprefix("<s>hello") for one in output.sequences} <= {"ab", "ba"}
    # All four are whole: each has another of the many end tokens.
    assert [one.finish_reason for one in output.sequences] == ["stop"] * 4
    for sequence in output.sequences:
        total = sum(
            position[token].logprob
            for position, token in zip(sequence.logprobs, sequence.tokens[-len(sequence.logprobs) :], strict=True)
        )
        assert sequence.cum_logprob == pytest.approx(total, abs=1e-5)
    with pytest.raises(ValueError, match="structured_outputs: regex cannot be compiled"):
        llm.beam_search("hello", {"beam_width": 2, "max_tokens": 4, "structured_outputs": {"regex": "("}})


@pytest.mark.model
def test_the_demo_models_text_is_that_of_transformers(demo_model: Path) -> None:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(demo_model.parent, gguf_file=demo_model.name, dtype=torch.float32).eval()
    params = BeamSearchParams(beam_width=4, max_tokens=10, rules="transformers")
    prompt = "The three largest cities of France are"
    with LLM(str(demo_model), dtype="float32", device="cpu", max_model_len=64) as llm:
        (output,) = llm.beam_search(prompt, params)
        tokenizer = llm.get_tokenizer()
    expected = transformers_beams(model, tokenizer(prompt)["input_ids"], params)
    assert [sequence.text for sequence in output.sequences] == [tokenizer.decode(row) for row in expected]


def test_every_form_of_prompt_finds_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer()("hello world")["input_ids"]
    forms: list[Any] = ["hello world", {"prompt": "hello world"}, {"prompt_token_ids": ids}, ids]
    outputs = llm.beam_search(forms, PARAMS)
    assert tokens(outputs) == [tokens(outputs)[0]] * len(forms)
    assert tokens(llm.beam_search("hello world", {"beam_width": 4, "max_tokens": 8})) == tokens(outputs[:1])
    assert llm.beam_search([], PARAMS) == []


def test_a_sequence_has_its_texts_and_log_probabilities(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=10, rules="transformers")
    shown = dataclasses.replace(params, include_stop_str_in_output=True)
    prompts = ["hello world", "the quick brown fox", "jumps over the lazy dog", "a"]
    tokenizer = llm.get_tokenizer()
    sequences = [one for output in llm.beam_search(prompts, params) for one in output.sequences]
    with_ends = [one for output in llm.beam_search(prompts, shown) for one in output.sequences]
    assert {one.finish_reason for one in sequences} == {"stop", "length"}
    for one, other in zip(sequences, with_ends, strict=True):
        stopped = one.finish_reason == "stop"
        assert one.tokens == other.tokens
        for text, shown_tokens in ((other.text, one.tokens), (one.text, one.tokens[:-1] if stopped else one.tokens)):
            assert str(text).rstrip("\ufffd") == tokenizer.decode(shown_tokens).rstrip("\ufffd")
        assert one.stop_reason == (one.tokens[-1] if stopped else None)
        written = one.tokens[-len(one.logprobs) :]
        drawn = [position[token_id] for position, token_id in zip(one.logprobs, written, strict=True)]
        assert [each.decoded_token for each in drawn] == [tokenizer.decode([token_id]) for token_id in written]
        assert sum(each.logprob for each in drawn) == pytest.approx(one.cum_logprob, abs=1e-5)


def test_a_prompt_that_cannot_be_run_is_one_result(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    given: list[Any] = ["hello", [], [5] * 96, 7, {"text": "x"}, [5, 331], [5, -1], "world", {"prompt": 3}]
    outputs = llm.beam_search(given, PARAMS)
    assert [bool(output.sequences) for output in outputs] == [output.error is None for output in outputs]
    assert tokens([outputs[0], outputs[7]]) == tokens(llm.beam_search(["hello", "world"], PARAMS))
    said = ["is empty", "the prompt has 96 tokens", "prompt=7 is a int", "the keys", "holds 331", "prompt_token_ids="]
    failed = [outputs[place] for place in (1, 2, 3, 4, 5, 6, 8)]
    for output, part in zip(failed, [*said, "prompt=3 is a int"], strict=True):
        assert output.error is not None and output.error.startswith("ValueError: ") and part in output.error
    assert "7 of 9 prompts failed; the first: ValueError: prompt_token_ids is empty" in caplog.text


def test_without_a_tokenizer_tokens_come_and_no_texts(folder: Path, llm: LLM) -> None:
    ids = llm.get_tokenizer()("hello")["input_ids"]
    with LLM(str(folder), **SETTINGS, skip_tokenizer_init=True) as bare:
        outputs = bare.beam_search([ids], PARAMS)
        with pytest.raises(ValueError, match=r"prompts\[0\] is text, but skip_tokenizer_init=True"):
            bare.beam_search("hello", PARAMS)
    assert tokens(outputs) == tokens(llm.beam_search("hello", PARAMS))
    assert {one.text for one in outputs[0].sequences} == {None}


def test_each_prompt_is_run_with_its_adapter(folder: Path, tmp_path: Path) -> None:
    auto: Any = AutoModelForCausalLM
    save_adapter(tmp_path / "adapter", *adapter_pairs(auto.from_pretrained(folder), 3))
    adapter = LoRARequest("one", 1, str(tmp_path / "adapter"))
    with LLM(str(folder), **SETTINGS, enable_lora=True, max_lora_rank=16, max_loras=2) as llm:
        plain, adapted = llm.beam_search(["hello", "hello"], PARAMS, [None, adapter])
        (alone,) = llm.beam_search("hello", PARAMS, adapter)
        with pytest.raises(ValueError, match="lora_request has 1 entries for 2 prompts"):
            llm.beam_search(["a", "b"], PARAMS, [adapter])
    assert tokens([alone]) == tokens([adapted]) != tokens([plain])
    assert [one.lora_request for one in plain.sequences] == [None] * 4
    assert [one.lora_request and one.lora_request.lora_name for one in adapted.sequences] == ["one"] * 4


@pytest.mark.parametrize("limit", [1, 2, None])
def test_no_more_prompts_than_the_limit_are_searched_at_once(
    limit: int | None, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"row {index}" for index in range(6)]
    expected = tokens(llm.beam_search(prompts, PARAMS))
    seen: list[int] = []
    step = BeamSearch.step

    def counted_step(beams: BeamSearch) -> list[tuple[str, BeamSearchOutput]]:
        ended = step(beams)
        seen.append(len(beams._queue.groups) + len(ended))
        return ended

    monkeypatch.setattr(BeamSearch, "step", counted_step)
    assert tokens(llm.beam_search(prompts, PARAMS, concurrency_limit=limit)) == expected
    # Sixteen slots are four prompts of four beams.
    assert max(seen) == (limit or 4)


MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no prompts": ((None, PARAMS), {}, "prompts=None is a NoneType"),
    "parameters of sampling": (("a", SamplingParams()), {}, "is a SamplingParams: give BeamSearchParams or a dict"),
    "a list of parameters": ((["a"], [PARAMS]), {}, "is a list: give BeamSearchParams or a dict"),
    "no width": (("a", {"max_tokens": 3}), {}, "params lacks beam_width"),
    "an unknown name": (("a", {"beam_width": 2, "max_tokens": 3, "n": 1}), {}, "params has n, which beam search"),
    "a wrong value": (("a", {"beam_width": 0, "max_tokens": 3}), {}, "beam_width=0 is not valid"),
    "a strange token": (
        ("a", {"beam_width": 2, "max_tokens": 3, "allowed_token_ids": [5, 400]}),
        {},
        "allowed_token_ids names token 400, outside the vocabulary of 331",
    ),
    "no adapter": (("a", PARAMS, "x"), {}, "lora_request='x' is a str"),
    "no limit": (("a", PARAMS), {"concurrency_limit": 0}, "concurrency_limit=0 is not valid: give a whole number"),
    "a limit in words": (("a", PARAMS), {"concurrency_limit": "2"}, "concurrency_limit='2' is not valid"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case: str, llm: LLM) -> None:
    given, named, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        llm.beam_search(*given, **named)


def test_more_beams_than_a_step_has_rows_are_refused(folder: Path) -> None:
    with (
        LLM(str(folder), **{**SETTINGS, "max_num_seqs": 3, "max_num_batched_tokens": 3}) as llm,
        pytest.raises(ValueError, match="beam_width=4 is more than max_num_batched_tokens=3"),
    ):
        llm.beam_search("a", PARAMS)


def test_an_llm_that_has_other_work_or_sleeps_says_so(llm: LLM) -> None:
    llm.enqueue("hello", SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="1 enqueued prompts have results that were not taken"):
        llm.beam_search("a", PARAMS)
    llm.reset()
    llm.sleep(level=0)
    with pytest.raises(RuntimeError, match="this LLM sleeps"):
        llm.beam_search("a", PARAMS)
    llm.wake_up()
    assert llm.beam_search("a", PARAMS)[0].error is None


def test_a_pooling_model_is_refused(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert", pad_token_id=0)
    with (
        LLM(str(save_pair_tokenizer(tmp_path)), runner="pooling", device="cpu") as llm,
        pytest.raises(ValueError, match="as a pooling model: use embed"),
    ):
        llm.beam_search("a", PARAMS)


def interrupt(llm: LLM, at_step: int, times: int, patch: pytest.MonkeyPatch) -> None:
    engine = llm._live_engine()
    assert isinstance(engine, Engine)
    run, steps = engine._run_beams, []

    def counted_run(batch: Any) -> Any:
        steps.append(batch)
        if len(steps) == at_step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return run(batch)

    patch.setattr(engine, "_run_beams", counted_run)


def test_an_interrupted_call_returns_what_is_done(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"row {index}" for index in range(5)]
    expected = tokens(llm.beam_search(prompts, PARAMS))
    with monkeypatch.context() as patch:
        # Two prompts take 8 steps, and 8 are taken for the next.
        interrupt(llm, 12, 1, patch)
        outputs = llm.beam_search(prompts, PARAMS, concurrency_limit=2)
    done = [output.error is None for output in outputs]
    assert True in done and False in done
    for output, known in zip(outputs, expected, strict=True):
        if output.error is None:
            assert tokens([output]) == [known]
        else:
            assert "interrupted before this prompt was done" in output.error and output.sequences == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens(llm.beam_search(prompts, PARAMS)) == expected


def test_a_second_ctrl_c_raises_and_leaves_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(llm, 3, 2, patch)
        with pytest.raises(KeyboardInterrupt):
            llm.beam_search(["a", "b"], PARAMS)
    assert llm.beam_search("a", PARAMS)[0].error is None
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].error is None


def test_the_bar_counts_prompts(llm: LLM) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, desc: str) -> None:
            self.total, self.desc, self.done, self.postfix, self.closed = total, desc, 0, "", False
            bars.append(self)

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.postfix = text

        def update(self, count: int) -> None:
            self.done += count

        def close(self) -> None:
            self.closed = True

    llm.beam_search(["a", 7, "b"], PARAMS, use_tqdm=Bar)
    (bar,) = bars
    assert (bar.total, bar.desc, bar.done, bar.closed) == (3, "Beam search", 3, True)
    assert "output: " in bar.postfix
