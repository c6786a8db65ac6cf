"""What may be drawn next, where it depends on what was drawn: equal to transformers' logits processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, NoRepeatNGramLogitsProcessor
from transformers import LogitsProcessor as HuggingFaceProcessor

from raydata_llm.engine.bits import clear_bits, keep_only
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.thinking import Markers, ThinkingGuide
from tests.engine.number_tokenizer import NumberTokenizer

PROMPT = [5, 9, 300, 41, 8]
THINK, END = 700, (701, 702)
MARKERS = {"reasoning_start_str": "700", "reasoning_end_str": "701 702"}


class NoRepeats:
    """A user's processor: transformers' own, for requests that name a size."""

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size

    def new_request_processor(self, params: SamplingParams) -> Any:
        size = params.extra_args.get("no_repeats_of")
        if size is None:
            return None
        if size == 0:
            raise ValueError("extra_args['no_repeats_of']=0 is not valid: give 1 or more")
        size *= {"tokens": 1}[params.extra_args.get("unit", "tokens")]
        no_repeats: Any = NoRepeatNGramLogitsProcessor(size)

        def process(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            assert logits.shape == (self.vocab_size,) and logits.dtype == torch.float32
            changed: torch.Tensor = no_repeats(torch.tensor([prompt + output]), logits[None])[0]
            return changed

        return process


@pytest.fixture(scope="module")
def model_path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def model(model_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path).eval()


@pytest.fixture(scope="module", params=[0, 2], ids=["read at once", "launched ahead"])
def engine(request: pytest.FixtureRequest, model_path: str) -> Engine:
    config = EngineConfig(
        model=model_path,
        device="cpu",
        steps_ahead=request.param,
        reasoning_config=MARKERS,
        logits_processors=["tests.engine.test_guides:NoRepeats"],
    )
    return Engine(config, NumberTokenizer())


def run(engine: Engine, params: list[dict[str, Any]], prompt: list[int] = PROMPT) -> list[RequestOutput]:
    for index, one in enumerate(params):
        sampling_params = SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | one))
        token_ids = np.array(prompt, dtype=np.int32)
        engine.add_request(
            Request(request_id=str(index), prompt_token_ids=token_ids, sampling_params=sampling_params, key=index)
        )
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    return [outputs[str(index)] for index in range(len(params))]


def greedy_tokens(engine: Engine, prompt: list[int] = PROMPT, **params: Any) -> list[int]:
    return run(engine, [params], prompt)[0].outputs[0].token_ids


def expected_tokens(model: Any, **settings: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, **settings)
    tokens: list[int] = made[0, len(PROMPT) :].tolist()
    return tokens


class Penalties(HuggingFaceProcessor):
    """Presence and frequency penalties by their definition, over the output."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, len(PROMPT) :], minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def test_bad_words_are_transformers(engine: Engine, model: Any) -> None:
    free = greedy_tokens(engine)
    words = [free[2:4], [free[7]], free[9:12]]
    expected = expected_tokens(model, bad_words_ids=words)
    assert expected != free
    assert greedy_tokens(engine, bad_words=[" ".join(map(str, word)) for word in words]) == expected


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"logit_bias": {17: 6.0, 400: -3.0}}, {"sequence_bias": [[[17], 6.0], [[400], -3.0]]}),
        ({"min_tokens": 9, "logit_bias": {2: 100.0}}, {"min_new_tokens": 9, "sequence_bias": [[[2], 100.0]]}),
        (
            {"allowed_token_ids": list(range(2, 1031, 3))},
            {"suppress_tokens": [token for token in range(1031) if token % 3 != 2]},
        ),
        ({"extra_args": {"no_repeats_of": 1}}, {"no_repeat_ngram_size": 1}),
        (
            {"extra_args": {"no_repeats_of": 2}, "repetition_penalty": 1.2},
            {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        ),
    ],
    ids=lambda given: ",".join(given),
)
def test_logits_processors_are_transformers(
    params: dict[str, Any], settings: dict[str, Any], engine: Engine, model: Any
) -> None:
    assert greedy_tokens(engine, **params) == expected_tokens(model, **settings)


def test_presence_and_frequency_penalties_are_their_definition(engine: Engine, model: Any) -> None:
    # A bias makes the row repeat itself until the penalties outweigh it.
    biased: dict[str, Any] = {"sequence_bias": [[[17], 9.0]]}
    expected = expected_tokens(model, logits_processor=LogitsProcessorList([Penalties(1.5, 0.75)]), **biased)
    assert expected != expected_tokens(model, **biased)
    assert greedy_tokens(engine, presence_penalty=1.5, frequency_penalty=0.75, logit_bias={17: 9.0}) == expected


def test_a_processor_is_only_asked_for_rows_that_want_it(engine: Engine) -> None:
    free, _, beside = run(engine, [{}, {"extra_args": {"no_repeats_of": 1}}, {"extra_args": {"other": 1}}])
    assert free.outputs[0].token_ids == beside.outputs[0].token_ids == greedy_tokens(engine)


@pytest.mark.parametrize("extra_args", [{"no_repeats_of": 0}, {"no_repeats_of": 2, "unit": "words"}])
def test_a_processor_may_refuse_a_request_by_any_error(engine: Engine, extra_args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"extra_args.*no_repeats_of.*is not valid"):
        run(engine, [{"extra_args": extra_args}])
    assert not engine.has_unfinished()


@pytest.mark.parametrize("budget", [0, 1, 6])
def test_thinking_ends_when_its_budget_is_spent(engine: Engine, budget: int) -> None:
    tokens = greedy_tokens(engine, [*PROMPT, THINK], thinking_token_budget=budget)
    assert tokens[: budget + 2] == greedy_tokens(engine, [*PROMPT, THINK])[:budget] + list(END)
    assert len(tokens) == 24 and not set(tokens[budget + 2 :]) & {THINK}


def test_thinking_that_begins_in_the_output_counts_from_there(engine: Engine) -> None:
    tokens = greedy_tokens(engine, thinking_token_budget=3, logit_bias={THINK: 1000.0})
    assert tokens[:7] == [THINK] * 4 + [*END, THINK]


def test_no_thinking_has_no_budget(engine: Engine) -> None:
    closed = [*PROMPT, THINK, 6, *END]
    assert greedy_tokens(engine, closed, thinking_token_budget=0) == greedy_tokens(engine, closed)
    assert greedy_tokens(engine, [*PROMPT, THINK], thinking_token_budget=-1) == greedy_tokens(engine, [*PROMPT, THINK])


def test_guides_survive_each_other(engine: Engine) -> None:
    free = greedy_tokens(engine, [*PROMPT, THINK])
    both = greedy_tokens(engine, [*PROMPT, THINK], thinking_token_budget=4, bad_words=[str(free[1])])
    assert free[1] not in both and tuple(both[4:6]) == END


def test_words_need_a_tokenizer(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    for params in ({"bad_words": ["5"]}, {"thinking_token_budget": 1}):
        with pytest.raises(ValueError, match=next(iter(params))):
            run(engine, [params])
    assert not engine.has_unfinished()


@pytest.mark.parametrize("given", ["nowhere:Class", "tests.engine.test_guides:Nothing", "tests.engine", int])
def test_processors_that_are_none_are_refused(given: Any, model_path: str) -> None:
    with pytest.raises(ValueError, match="logits_processors"):
        Engine(EngineConfig(model=model_path, device="cpu", logits_processors=[given]))


def test_skipping_the_prefix_cache(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", block_size=4))
    prompt = list(range(10, 40))
    first, second, third = (
        run(engine, [{"skip_reading_prefix_cache": skip}], prompt)[0] for skip in (False, False, True)
    )
    assert [one.num_cached_tokens for one in (first, second, third)] == [0, 28, 0]
    assert first.outputs[0].token_ids == third.outputs[0].token_ids


def test_bits() -> None:
    words = np.full(4, -1, dtype=np.int32)
    clear_bits(words, (0, 31, 32, 127, 127))
    cleared = [token for token in range(128) if not words[token // 32] >> (token % 32) & 1]
    assert cleared == [0, 31, 32, 127]
    keep_only(words, 95)
    assert [token for token in range(128) if words[token // 32] >> (token % 32) & 1] == [95]


def test_words_that_many_outputs_may_not_hold_are_encoded_once(model_path: str) -> None:
    encoded: list[str] = []

    class CountingTokenizer(NumberTokenizer):
        def encode(self, text: str, /, *, add_special_tokens: bool) -> Any:
            encoded.append(text)
            return super().encode(text, add_special_tokens=add_special_tokens)

    config = EngineConfig(model=model_path, device="cpu", reasoning_config=MARKERS)
    engine = Engine(config, CountingTokenizer())
    run(engine, [{"bad_words": ["17", "4 5"], "thinking_token_budget": 3, "n": 2, "temperature": 1.0}] * 3)
    assert encoded == ["17", " 17", "4 5", " 4 5", "700", "701 702"]


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [([1, 700, 4], True), ([700, 4, 701, 702], False), ([700, 701, 4], True), ([701, 702, 700], True), ([702], False)],
)
def test_the_last_marker_of_a_prompt_says_whether_it_thinks(prompt: list[int], thinks: bool) -> None:
    guide = ThinkingGuide(Markers([700], [701, 702]), 0, np.array(prompt, dtype=np.int32))
    words = np.full(33, -1, dtype=np.int32)
    guide.forbid(words)
    assert (np.count_nonzero(words) == 1) == thinks


def test_tokens_that_the_model_does_not_have_are_never_written(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"), NumberTokenizer())
    free = greedy_tokens(engine)
    assert greedy_tokens(engine, bad_words=["5000", f"{free[0]} 5000"]) == free
    markers = {"reasoning_start_str": "5", "reasoning_end_str": "5000"}
    engine = Engine(EngineConfig(model=model_path, device="cpu", reasoning_config=markers), NumberTokenizer())
    with pytest.raises(ValueError, match="outside its vocabulary of 1031"):
        greedy_tokens(engine, thinking_token_budget=1)
