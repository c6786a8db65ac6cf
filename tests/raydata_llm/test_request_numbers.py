"""Numbers of any size and kind in requests, and what is left of an engine when a step fails of one."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm import LLM, BeamSearchParams, SamplingParams
from raydata_llm.engine.beam_group import BeamGroup
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.model_runner import ModelRunner
from raydata_llm.engine.param_values import LARGEST_COUNT
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.sequence import SequenceTable
from raydata_llm.engine.waiting_queue import WaitingQueue
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

DRAWN = {"top_k": 5, "seed": 3, "temperature": 0.5}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[..., Path]) -> LLM:
    folder = tiny_model("llama")
    save_tokenizer(folder)
    return LLM(str(folder), device="cpu", max_model_len=64, max_num_seqs=8)


def one(llm: LLM, prompt: Any = "hello world", **params: Any) -> Any:
    return llm.generate([prompt], [GREEDY | params], use_tqdm=False)[0]


def tokens_of(llm: LLM, **params: Any) -> list[int]:
    result = one(llm, **params)
    assert result.error is None, result.error
    tokens: list[int] = result.outputs[0].token_ids
    return tokens


def assert_whole(llm: LLM) -> None:
    assert isinstance(llm._engine, Engine)
    llm._engine.check_integrity()
    assert not llm._engine.has_unfinished()


def test_one_seed_draws_other_noise_for_each_prompt(llm: LLM) -> None:
    params = SamplingParams(seed=42, temperature=1000.0, max_tokens=1)
    prompts = [f"prompt {number}" for number in range(16)]
    first = [result.outputs[0].token_ids[0] for result in llm.generate(prompts, params, use_tqdm=False)]
    assert len(set(first)) >= 14
    again = [result.outputs[0].token_ids[0] for result in llm.generate(prompts[::-1], params, use_tqdm=False)]
    assert again[::-1] == first, "neither the order nor the call counts"
    llm.enqueue(prompts, params)
    assert [result.outputs[0].token_ids[0] for result in llm.wait_for_completion(use_tqdm=False)] == first
    same = llm.generate(["prompt 3"] * 5, params, use_tqdm=False)
    assert [result.outputs[0].token_ids[0] for result in same] == [first[3]] * 5


@pytest.mark.parametrize(
    ("huge", "plain"),
    [
        ({"top_k": 2**63, "temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1}),
        ({"top_k": 10**5000, "temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1}),
        ({"min_tokens": 2**31, "max_tokens": None}, {"max_tokens": None}),
        ({"max_tokens": 2**63}, {"max_tokens": None}),
        ({"truncate_prompt_tokens": 2**63}, {}),
        ({"thinking_token_budget": 2**63}, {}),
        ({"repetition_detection": {"max_pattern_size": 2**70, "min_count": 2**70}}, {}),
        ({"top_k": np.array(5), "seed": np.uint64(3), "temperature": np.float32(0.5)}, DRAWN),
        ({"top_k": Decimal("5"), "seed": 3.0, "temperature": Decimal("0.5")}, DRAWN),
        ({"temperature": 1e-320}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_a_number_beyond_what_there_is_means_all_there_is(llm: LLM, huge: Any, plain: Any) -> None:
    assert tokens_of(llm, **huge) == tokens_of(llm, **plain)
    assert_whole(llm)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_tokens_are_all(llm: LLM, name: str) -> None:
    huge, plain = (one(llm, **{name: count}) for count in (2**63, -1))
    found, expected = (one_result.outputs[0].logprobs or one_result.prompt_logprobs for one_result in (huge, plain))
    assert found is not None and list(found) == list(expected)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"n": 2**40}, "n=1099511627776 is not valid: an engine holds at most 16,384"),
        ({"n": 16385}, "n=16385 is not valid"),
        ({"seed": 2**64}, "seed=18446744073709551616 is not valid: give a number of 64 bits"),
        ({"seed": 10**5000}, "seed=<an integer of 16610 bits> is not valid"),
        ({"temperature": 1e39}, "temperature=1e+39 is not valid: give a number from 0 to 3.40282e+38"),
        ({"temperature": 10**400}, "temperature=<an integer of 1329 bits> is not valid: give a number"),
        ({"top_p": np.array([0.5])}, "top_p=array([0.5]) is not valid: give a number"),
        ({"top_k": np.array([5])}, "top_k=array([5]) is not valid: give a whole number"),
        ({"top_k": np.bool_(True)}, "is not valid: give a whole number"),
        ({"max_tokens": Decimal("1E+1000000")}, "is not valid: give a whole number or None"),
        ({"prompt_logprob_token_ids": [1], "prompt_logprob_start": 2**63}, "prompt_logprob_start="),
        ({"stop_token_ids": [2**63]}, "stop_token_ids=[9223372036854775808] is not valid: token ids are 0 or more"),
        ({"stop_token_ids": range(1025)}, "it names 1,025 tokens: name at most 1,024"),
        ({"allowed_token_ids": [-(2**63)]}, "allowed_token_ids=[-9223372036854775808] is not valid"),
        ({"allowed_token_ids": [0] * (2**20 + 1)}, "allowed_token_ids has 1,048,577 token ids: give at most 1,048,576"),
        ({"logit_bias": {2**63: 1.0}}, "logit_bias={9223372036854775808: 1.0} is not valid"),
        ({"logit_bias": {5: 1e39}}, "to numbers up to 3.40282e+38"),
        ({"bad_words": ["a" * 1_000_000]}, "bad_words has 1 strings of 1,000,000 characters together: give"),
        ({"stop": [f"s{number}" for number in range(100_000)]}, "stop has 100,000 strings of 588,890 characters"),
        ({"repetition_detection": {"max_pattern_size": 1.5}}, "repetition_detection.max_pattern_size=1.5 is not valid"),
    ],
)  # fmt: skip
def test_a_number_without_a_meaning_is_its_prompts_error(llm: LLM, params: Any, error: str) -> None:
    good, bad = llm.generate(["hello world"] * 2, [GREEDY, GREEDY | params], use_tqdm=False)
    assert bad.error is not None and bad.error.startswith("ValueError: ") and error in bad.error
    assert len(bad.error) < 2000
    assert good.error is None
    assert_whole(llm)


def test_log_probabilities_that_would_fill_the_host_are_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", vocab_size=200_003, num_hidden_layers=1, max_position_embeddings=8192)
    llm = LLM(str(folder), device="cpu", skip_tokenizer_init=True, max_num_seqs=2)
    prompt = [5] * 6000
    for params, name in (
        ({"logprobs": -1, "max_tokens": None}, "logprobs"),
        ({"logprobs": -1, "max_tokens": 10, "n": 400, "temperature": 1.0}, "logprobs"),
        ({"prompt_logprobs": 2**40}, "prompt_logprobs"),
        ({"prompt_logprob_token_ids": range(200_000)}, "prompt_logprob_token_ids"),
    ):
        asked = [5, 6] if "max_tokens" in params and params["max_tokens"] is None else prompt
        error = one(llm, asked, **params).error
        assert error is not None and error.startswith(f"ValueError: {name} asks for "), error


def test_an_output_counts_as_repeating_as_before(llm: LLM) -> None:
    tokens = tokens_of(llm, logit_bias={7: 1000.0}, repetition_detection={"max_pattern_size": 9, "min_count": 3})
    assert tokens == [7, 7, 7]


def _break_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> None:
    """Let a method do its work, and raise once it was called so often: in the midst of what its caller does."""
    original, calls = getattr(owner, name), [0]

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == after:
            raise OverflowError("Python integer 2147483651 out of bounds for int32")
        return result

    monkeypatch.setattr(owner, name, breaking)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SequenceTable, "occupy"),
        (Scheduler, "_grow"),
        (Scheduler, "_launch"),
        (Scheduler, "update"),
        (Scheduler, "_finish"),
        (ModelRunner, "launch"),
        (Engine, "_note_scheduled"),
    ],
)
def test_a_step_that_ends_anywhere_leaves_an_engine_that_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int
) -> None:
    prompts = ["hello world " * 4, "hello world " * 4 + "fox", "the", "lazy dog"]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1, "n": 3},
        {"repetition_penalty": 1.2},
        {"logprobs": 2},
    ]
    params = [GREEDY | kind for kind in kinds]

    def outputs() -> list[list[list[int]]]:
        results = llm.generate(prompts, params, use_tqdm=False)
        return [[output.token_ids for output in result.outputs] for result in results]

    expected = outputs()
    with monkeypatch.context() as patch:
        _break_once(patch, owner, name, after)
        with pytest.raises(OverflowError):
            outputs()
    assert_whole(llm)
    assert outputs() == expected
    assert_whole(llm)


def test_a_request_that_is_half_taken_in_is_its_prompts_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens_of(llm)
    _break_once(monkeypatch, WaitingQueue, "push", after=2)
    bad, good = llm.generate(["hello", "hello world"], [GREEDY | {"temperature": 1.0, "n": 4}, GREEDY], use_tqdm=False)
    assert bad.error is not None and bad.error.startswith("OverflowError")
    assert good.outputs[0].token_ids == expected
    assert_whole(llm)


def test_a_beam_search_that_fails_in_a_step_leaves_an_engine_that_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(llm)
    params = BeamSearchParams(beam_width=3, max_tokens=5)
    found = llm.beam_search(["hello world", "the"], params)
    for name in ("fork", "grow"):
        with monkeypatch.context() as patch:
            _break_once(patch, BeamGroup, name, after=2)
            with pytest.raises(OverflowError):
                llm.beam_search(["hello world", "the"], params)
        assert_whole(llm)
    assert tokens_of(llm) == expected
    again = llm.beam_search(["hello world", "the"], params)
    assert [[one.tokens for one in result.sequences] for result in again] == [
        [one.tokens for one in result.sequences] for result in found
    ]


def test_a_watch_that_raises_is_its_rows_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from raydata_llm.engine.detokenizer import StopStringWatch

    _break_once(monkeypatch, StopStringWatch, "advance", after=2)
    bad, good = llm.generate(["hello"] * 2, [GREEDY | {"stop": "zz"}, GREEDY], use_tqdm=False)
    assert bad.error is not None and bad.error.startswith("OverflowError")
    assert good.error is None and len(good.outputs[0].token_ids) == 6
    assert_whole(llm)


def test_beam_parameters_take_numbers_as_they_come(llm: LLM) -> None:
    plain = llm.beam_search(["hello world"], BeamSearchParams(beam_width=2, max_tokens=64))[0]
    huge: Any = {"beam_width": np.int64(2), "max_tokens": 2**70, "length_penalty": np.float32(1.0)}
    assert [one.tokens for one in llm.beam_search(["hello world"], huge)[0].sequences] == [
        one.tokens for one in plain.sequences
    ]
    for wrong in ({"beam_width": 2**63}, {"length_penalty": 1e308}, {"temperature": float("nan")}, {"beam_width": "2"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BeamSearchParams.from_value({"beam_width": 2, "max_tokens": 4} | wrong)


def test_counts_have_31_bits() -> None:
    params = SamplingParams(max_tokens=2**80, min_tokens=2**80, top_k=2**80, logprobs=2**80)
    counts = (params.max_tokens, params.min_tokens, params.top_k, params.logprobs)
    assert counts == (LARGEST_COUNT,) * 4
