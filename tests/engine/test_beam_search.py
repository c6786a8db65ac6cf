"""Beam search equals transformers' under its rules, and a plain search written out here under vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine import decode_plan
from raydata_llm.engine.beam_params import BeamRequest, BeamSearchOutput, BeamSearchParams
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams

PROMPT_LENGTHS = (1, 5, 16, 17, 33, 40)
MAX_TOKENS = 14
END_TOKENS = (2, 7, 11)
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 96, "block_size": 4}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "default blocks": {"block_size": 16},
    "chunked prefill": {"max_num_batched_tokens": 12, "max_num_seqs": 12},
    "no prefix cache": {"enable_prefix_caching": False},
    "one group at a time": {"max_num_seqs": 4},
    "few blocks": {"num_gpu_blocks_override": 41},
    "shared prefixes": {"shared": True},
}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    # Several end tokens of a vocabulary this small are met often.
    return tiny_model("llama", vocab_size=61, eos_token_id=[2, 7, 11])


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def draw_prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    prompts: list[list[int]] = [rng.integers(12, 61, size=length).tolist() for length in PROMPT_LENGTHS]
    return [*prompts, prompts[-1][:20] + prompts[0], prompts[-1]]


def search(
    engine: Engine, prompts: list[list[int]], params: BeamSearchParams | list[BeamSearchParams]
) -> list[BeamSearchOutput]:
    each = params if isinstance(params, list) else [params] * len(prompts)
    beams = engine.beam_search()
    for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        request = BeamRequest(request_id=str(number), prompt_token_ids=np.array(prompt, dtype=np.int32), params=one)
        engine.check_beam_request(request)
        beams.add(request)
    found: dict[str, BeamSearchOutput] = {}
    while beams.has_unfinished():
        found |= dict(beams.step())
        beams.check_integrity()
    beams.close()
    engine.check_integrity()
    return [found[str(number)] for number in range(len(prompts))]


def transformers_beams(model: Any, prompt: list[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
        )
    rows = zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True)
    return [(strip(tokens, len(prompt)), score) for tokens, score in rows]


def strip(tokens: list[int], num_prompt: int) -> list[int]:
    """Without the padding after an end token."""
    for place, token in enumerate(tokens[num_prompt:], start=num_prompt + 1):
        if token in END_TOKENS:
            return tokens[:place]
    return tokens


def plain_vllm_beams(model: Any, prompt: list[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """vLLM's rules written out: every prefix is computed from its start, and the search goes on to max_tokens."""

    @cache
    def next_logprobs(tokens: tuple[int, ...]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
        values: list[float] = logits.log_softmax(-1).tolist()
        return values

    ends = () if params.ignore_eos else END_TOKENS
    running: list[tuple[tuple[int, ...], float]] = [(tuple(prompt), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for _ in range(params.max_tokens):
        following: list[tuple[tuple[int, ...], float]] = []
        for tokens, total in running:
            values = next_logprobs(tokens)
            allowed = range(len(values)) if params.allowed_token_ids is None else params.allowed_token_ids
            # Two more candidates than vLLM's for the two more end tokens.
            best = sorted(allowed, key=lambda token: -values[token])[: 2 * params.beam_width + max(0, len(ends) - 1)]
            for token in best:
                (finished if token in ends else following).append(((*tokens, token), total + values[token]))
        running = sorted(following, key=lambda one: -one[1])[: params.beam_width]

    def score(one: tuple[tuple[int, ...], float]) -> float:
        length = len(one[0]) - (one[0][-1] in END_TOKENS)
        return float(one[1] / length**params.length_penalty)

    best_first = sorted([*finished, *running], key=score, reverse=True)[: params.beam_width]
    return [(list(one[0]), score(one)) for one in best_first]


def assert_equal(output: BeamSearchOutput, expected: list[tuple[list[int], float]]) -> None:
    assert output.error is None
    assert [one.tokens for one in output.sequences] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([one.score for one in output.sequences], [score for _, score in expected], atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_finds_what_transformers_finds(
    way: str, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, **WAYS[way]}
    if settings.pop("shared", False):
        for name, value in {"_MIN_ROWS": 2, "_TOKENS_PER_LAUNCH": 0, "_TOKENS_PER_SHARED_KEY": 0}.items():
            monkeypatch.setattr(decode_plan, name, value)
    params = BeamSearchParams(beam_width=4, max_tokens=MAX_TOKENS, rules="transformers")
    outputs = search(Engine(EngineConfig(model=str(folder), **settings)), draw_prompts(), params)
    for output, prompt in zip(outputs, draw_prompts(), strict=True):
        assert_equal(output, transformers_beams(model, prompt, params))
    reasons = {one.finish_reason for output in outputs for one in output.sequences}
    assert reasons == {"stop", "length"}, "both ends must be met"


@pytest.mark.parametrize("width", [2, 3, 7, 16])
@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"), [(1.0, False), (0.0, True), (2.0, "never"), (-1.0, False)]
)
def test_every_width_and_stopping_finds_what_transformers_finds(
    width: int, length_penalty: float, early_stopping: Any, folder: Path, model: Any
) -> None:
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=9,
        rules="transformers",
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    prompts = draw_prompts()[1:4]
    outputs = search(Engine(EngineConfig(model=str(folder), **SETTINGS)), prompts, params)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert_equal(output, transformers_beams(model, prompt, params))


VLLM: dict[str, dict[str, Any]] = {
    "width 4": {},
    "width 1": {"beam_width": 1},
    "width 16": {"beam_width": 16, "max_tokens": 4},
    "ignore_eos": {"ignore_eos": True},
    "long favoured": {"length_penalty": 3.0},
    "short favoured": {"length_penalty": -1.0},
    "no penalty": {"length_penalty": 0.0},
    "few allowed": {"allowed_token_ids": [2, 15, 16, 17]},
    "one allowed": {"allowed_token_ids": [30]},
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("case", VLLM)
def test_vllm_rules_find_what_the_search_written_out_finds(case: str, folder: Path, model: Any) -> None:
    params = BeamSearchParams(**{"beam_width": 4, "max_tokens": 7, **VLLM[case]})
    prompts = draw_prompts()[:4]
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    for output, prompt in zip(search(engine, prompts, params), prompts, strict=True):
        assert_equal(output, plain_vllm_beams(model, prompt, params))


def test_log_probabilities_of_the_tokens_add_up(folder: Path) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    for output in search(Engine(EngineConfig(model=str(folder), **SETTINGS)), draw_prompts()[:3], params):
        for one in output.sequences:
            written = one.tokens[-len(one.logprobs) :]
            drawn = [position[token].logprob for position, token in zip(one.logprobs, written, strict=True)]
            assert sum(drawn) == pytest.approx(one.cum_logprob, abs=1e-6)
            assert all(len(position) == 8 for position in one.logprobs)
            assert [position[max(position, key=lambda t: position[t].logprob)].rank for position in one.logprobs] == [
                1
            ] * len(written)


def test_groups_of_all_widths_run_beside_each_other(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    prompts = draw_prompts()
    each = [BeamSearchParams(beam_width=1 + 2 * index, max_tokens=3 + index) for index in range(len(prompts))]
    together = search(engine, prompts, each)
    assert engine.stats().num_decode_rows > engine.stats().num_steps
    for output, prompt, params in zip(together, prompts, each, strict=True):
        alone = search(engine, [prompt], params)[0]
        assert [one.tokens for one in alone.sequences] == [one.tokens for one in output.sequences]
        assert len(output.sequences) == params.beam_width


def test_a_group_that_needs_more_blocks_than_there_are_is_an_error_and_the_others_run(folder: Path) -> None:
    # 28 blocks of 4 tokens: one sequence of max_model_len, and little more.
    engine = Engine(EngineConfig(model=str(folder), **{**SETTINGS, "num_gpu_blocks_override": 29}))
    small = BeamSearchParams(beam_width=2, max_tokens=5)
    # Its beams are all alike but for one token early on, so that they share little.
    large = BeamSearchParams(beam_width=16, max_tokens=60, ignore_eos=True)
    prompts = draw_prompts()[1:5]
    first, failed, *rest = search(engine, prompts, [small, large, small, small])
    assert failed.error is not None and failed.error.startswith("ValueError: beam_width=16 over a prompt of 16 tokens")
    assert "num_gpu_blocks_override" in failed.error and failed.sequences == []
    assert [len(output.sequences) for output in (first, *rest)] == [2, 2, 2]


def test_a_search_that_is_closed_early_leaves_nothing_behind(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    prompts = draw_prompts()
    params = BeamSearchParams(beam_width=4, max_tokens=20)
    beams = engine.beam_search()
    for number, prompt in enumerate(prompts):
        beams.add(BeamRequest(request_id=str(number), prompt_token_ids=np.array(prompt, dtype=np.int32), params=params))
    for _ in range(4):
        beams.step()
    beams.close()
    engine.check_integrity()
    assert not beams.has_unfinished() and engine.stats().kv_usage == 0
    assert all(output.error is None for output in search(engine, prompts, params))


def test_generation_after_a_search_is_as_without_it(folder: Path) -> None:
    prompts = draw_prompts()
    # A penalty has state in each slot; it must not leak into beams, nor beams into it.
    params = SamplingParams(temperature=0.0, max_tokens=8, repetition_penalty=1.7, ignore_eos=True)

    def generated(engine: Engine) -> list[list[int]]:
        for number, prompt in enumerate(prompts):
            ids = np.array(prompt, dtype=np.int32)
            engine.add_request(Request(request_id=str(number), prompt_token_ids=ids, sampling_params=params))
        found: dict[str, list[int]] = {}
        while engine.has_unfinished():
            found |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        return [found[str(number)] for number in range(len(prompts))]

    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    asked = BeamSearchParams(beam_width=4, max_tokens=6)
    expected, alone = generated(engine), search(Engine(EngineConfig(model=str(folder), **SETTINGS)), prompts, asked)
    found = search(engine, prompts, asked)
    assert [[one.tokens for one in output.sequences] for output in found] == [
        [one.tokens for one in output.sequences] for output in alone
    ]
    assert generated(engine) == expected


def ask(request_id: str) -> Request:
    ids = np.array([20], dtype=np.int32)
    return Request(request_id=request_id, prompt_token_ids=ids, sampling_params=SamplingParams(max_tokens=4))


def test_a_step_that_fails_leaves_the_slots_of_beams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(model=str(folder), **{**SETTINGS, "max_num_seqs": 2}))
    scheduler = engine._scheduler
    before = scheduler.table.num_slots, scheduler.table.num_free_slots
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "schedule", lambda *_: 1 / 0)
        engine.add_request(ask("0"))
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert (scheduler.table.num_slots, scheduler.table.num_free_slots) == before == (scheduler.limits.num_slots, 2)


def test_a_search_and_generation_keep_each_other_out_until_they_have_ended(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    engine.add_request(ask("0"))
    with pytest.raises(RuntimeError, match="while 1 requests are unfinished"):
        engine.beam_search()
    while engine.has_unfinished():
        engine.step()
    beams = engine.beam_search()
    for work in (lambda: engine.add_request(ask("1")), engine.step, engine.beam_search, engine.sleep):
        with pytest.raises(RuntimeError, match=r"has the engine to itself: finish it, and close\(\) it"):
            work()
    beams.close()
    engine.add_request(ask("1"))
    assert engine.abort_all()[0].request_id == "1"


def test_shutdown_closes_an_open_search(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    beams = engine.beam_search()
    request = BeamRequest(
        request_id="0",
        prompt_token_ids=np.array([20, 30], dtype=np.int32),
        params=BeamSearchParams(beam_width=2, max_tokens=9),
    )
    beams.add(request)
    beams.step()
    engine.shutdown()
    engine.check_integrity()
    assert not beams.has_unfinished() and not beams.is_open
    for work in (beams.step, lambda: beams.add(request)):
        with pytest.raises(RuntimeError, match="this beam search was closed"):
            work()
    with pytest.raises(RuntimeError, match="the engine was shut down"):
        engine.beam_search()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no beams": ({"beam_width": 0}, "beam_width=0 is not valid: give a whole number from 1 to 16"),
    "many beams": ({"beam_width": 17}, "beam_width=17 is not valid"),
    "no tokens": ({"max_tokens": 0}, "max_tokens=0 is not valid"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens=1.5 is not valid"),
    "cold": ({"temperature": -1}, "temperature=-1 is not valid"),
    "no number": ({"length_penalty": "1"}, "length_penalty='1' is not valid"),
    "two grammars": (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs has regex and choice",
    ),
    "a form that goes on": ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos=True is not valid"),
    "other rules": ({"rules": "sglang"}, "rules='sglang' is not valid"),
    "stopping of others": ({"early_stopping": True}, "early_stopping=True is not valid: .*rules='transformers'"),
    "nothing allowed": ({"allowed_token_ids": []}, r"allowed_token_ids=\[\] is not valid"),
    "no flag": ({"ignore_eos": 1}, "ignore_eos=1 is not valid"),
    "unknown": ({"width": 4}, "params has width, which beam search does not know"),
}


@pytest.mark.parametrize("case", BAD)
def test_parameters_that_are_not_valid_are_named(case: str) -> None:
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        BeamSearchParams.from_value({"beam_width": 4, "max_tokens": 8, **changed})


def test_a_prompt_ends_at_max_model_len(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    prompt = (draw_prompts()[-1] * 3)[:94]
    output = search(engine, [prompt], BeamSearchParams(beam_width=4, max_tokens=50, ignore_eos=True))[0]
    assert {len(one.tokens) for one in output.sequences} == {96}
    assert {one.finish_reason for one in output.sequences} == {"length"}


def test_more_beams_than_the_engine_runs_are_refused(folder: Path) -> None:
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 3}
    engine = Engine(EngineConfig(model=str(folder), **{**SETTINGS, **sizes}))
    with pytest.raises(ValueError, match="beam_width=4 is more than max_num_batched_tokens=3"):
        search(engine, [[20]], BeamSearchParams(beam_width=4, max_tokens=4))


# CI searches with this model through LLM, in tests/raydata_llm/test_llm_beam.py.
@pytest.mark.slow
@pytest.mark.model
def test_the_demo_model_finds_what_transformers_finds(
    demo_model: Path, demo_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_reference.generation_config, "eos_token_id", 2)
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(200, 5000, size=length).tolist(), 198] for length in (4, 30)]
    engine = Engine(EngineConfig(model=str(demo_model), device="cpu", dtype="float32", max_model_len=128))
    params = BeamSearchParams(beam_width=4, max_tokens=20, rules="transformers")
    for output, prompt in zip(search(engine, prompts, params), prompts, strict=True):
        assert_equal(output, transformers_beams(demo_reference, prompt, params))
