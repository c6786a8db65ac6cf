"""Greedy output equals transformers' `generate`, token for token, whatever way the engine takes to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine import decode_plan
from raydata_llm.engine.decode_plan import DecodePlan
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.scheduler import Scheduler
from tests.engine.optimism import optimistic_admission

PROMPT_LENGTHS = (1, 5, 16, 17, 33, 64, 100, 3)
MAX_TOKENS = 40
TIGHT: dict[str, Any] = {"max_model_len": 141, "block_size": 5, "num_gpu_blocks_override": 30, "max_num_seqs": 7}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-bias": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
    },
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "mistral-window": {"sliding_window": 37},
}

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "whole prompts": {"enable_chunked_prefill": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "launched ahead": {"steps_ahead": 3},
    "shared prefixes": {"shared": True, "block_size": 4},
    "shared prefixes, launched ahead": {"shared": True, "block_size": 4, "steps_ahead": 2, "max_num_seqs": 6},
    "tiny KV": {**TIGHT, "max_num_batched_tokens": 7},
    "preempted": {**TIGHT, "optimistic": True},
    "preempted, launched ahead": {**TIGHT, "optimistic": True, "steps_ahead": 2},
    "preempted, no prefix cache": {**TIGHT, "optimistic": True, "enable_prefix_caching": False},
}


def draw_prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocab_size, size=length).tolist() for length in PROMPT_LENGTHS]
    shared = rng.integers(3, vocab_size, size=20).tolist()
    return [*prompts, shared + prompts[0], shared + prompts[1], shared]


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[..., Path]) -> Callable[[str], tuple[Path, list[list[int]], list[list[int]]]]:
    """Per family: model folder, prompts, and what transformers writes."""
    cache: dict[str, tuple[Path, list[list[int]], list[list[int]]]] = {}

    def build(name: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        if name not in cache:
            path = tiny_model(name.split("-")[0], **FAMILIES[name])
            model = AutoModelForCausalLM.from_pretrained(path).eval()
            prompts = draw_prompts(model.config.vocab_size)
            cache[name] = path, prompts, [transformers_greedy(model, prompt) for prompt in prompts]
        return cache[name]

    return build


def transformers_greedy(model: Any, prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, use_cache=True
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def engine_greedy(engine: Engine, prompts: list[list[int]], order: list[int]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    for index in order:
        prompt = np.array(prompts[index], dtype=np.int32)
        engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params))
    outputs: dict[int, list[int]] = {}
    while engine.has_unfinished():
        outputs |= {int(output.request_id): output.outputs[0].token_ids for output in engine.step()}
        engine.check_integrity()
    return [outputs[index] for index in range(len(prompts))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_transformers_writes(family: str, reference: Callable[[str], Any]) -> None:
    path, prompts, expected = reference(family)
    assert len({token for tokens in expected for token in tokens}) > 30, "the reference must not settle on one token"
    engine = Engine(EngineConfig(model=str(path), device="cpu"))
    assert engine_greedy(engine, prompts, list(range(len(prompts)))) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
def test_every_way_of_scheduling_writes_the_same(
    family: str, way: str, reference: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts, expected = reference(family)
    settings = dict(WAYS[way])
    plans = noted_plans(monkeypatch)
    if settings.pop("shared", False):
        for name, value in {"_MIN_ROWS": 2, "_TOKENS_PER_LAUNCH": 0, "_TOKENS_PER_SHARED_KEY": 0}.items():
            monkeypatch.setattr(decode_plan, name, value)
    with optimistic_admission(settings.pop("optimistic", False)):
        engine = Engine(EngineConfig(model=str(path), device="cpu", **settings))
        order = np.random.default_rng(len(way)).permutation(len(prompts)).tolist()
        assert engine_greedy(engine, prompts, order) == expected
    assert (engine.stats().num_preemptions > 0) == way.startswith("preempted")
    assert any(plan.num_groups for plan in plans) == way.startswith("shared prefixes")


def noted_plans(monkeypatch: pytest.MonkeyPatch) -> list[DecodePlan]:
    """The plans of decode rows that schedulers make from here on."""
    plans: list[DecodePlan] = []
    original = Scheduler._plan_of

    def note(self: Scheduler, *arguments: Any, **settings: Any) -> DecodePlan:
        plans.append(original(self, *arguments, **settings))
        return plans[-1]

    monkeypatch.setattr(Scheduler, "_plan_of", note)
    return plans


def test_a_second_pass_reads_prompts_from_the_prefix_cache(reference: Callable[[str], Any]) -> None:
    path, prompts, expected = reference("llama")
    engine = Engine(EngineConfig(model=str(path), device="cpu"))
    order = list(range(len(prompts)))
    assert engine_greedy(engine, prompts, order) == expected
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    longest = int(np.argmax([len(prompt) for prompt in prompts]))
    prompt = np.array(prompts[longest], dtype=np.int32)
    engine.add_request(Request(request_id="again", prompt_token_ids=prompt, sampling_params=params))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[0].outputs[0].token_ids == expected[longest]
    assert outputs[0].num_cached_tokens == (len(prompt) - 1) // 16 * 16


@pytest.mark.model
def test_the_demo_model_writes_what_transformers_writes(demo_model: Path, demo_reference: Any) -> None:
    rng = np.random.default_rng(3)
    # Ids of real words: 198 is a newline; the rest is drawn, which the model takes as odd prose and goes on with.
    prompts = [[1, *rng.integers(200, 5000, size=length).tolist(), 198] for length in (4, 30, 70)]
    expected = [transformers_greedy(demo_reference, prompt, 24) for prompt in prompts]
    ways: list[dict[str, Any]] = [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 2, "steps_ahead": 1}]
    for settings in ways:
        engine = Engine(EngineConfig(model=str(demo_model), device="cpu", dtype="float32", **settings))
        written = engine_greedy(engine, prompts, [2, 0, 1])
        assert [tokens[:24] for tokens in written] == expected
