"""An engine over several ranks writes what one rank writes: on a CPU, with processes and gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.number_tokenizer import NumberTokenizer
from tests.engine.optimism import optimistic_admission

# Two KV heads: with four ranks each head has two.
SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
TIGHT: dict[str, Any] = {"max_model_len": 141, "block_size": 5, "num_gpu_blocks_override": 34, "max_num_seqs": 7}
LAYOUTS = {"tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "pp3": (1, 3), "tp2 pp2": (2, 2)}
# One after the other in one engine, whose start costs more than they do.
KINDS: list[dict[str, Any]] = [
    *[{"temperature": 0.0, "max_tokens": 30}] * 8,
    {"temperature": 1.0},
    {"temperature": 0.9, "n": 3},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.8, "top_p": 0.5},
    {"temperature": 0.8, "top_k": 200},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.7, "logprobs": 0},
    {"temperature": 0.0, "logprob_token_ids": [4, 1000]},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 1.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {5: 3.0}, "min_tokens": 5},
    {"temperature": 0.0, "allowed_token_ids": [3, 700, 1030]},
    {"temperature": 1.0, "bad_words": [str(token) for token in range(3, 1031, 2)], "logprobs": 1},
]
LENGTHS = (1, 5, 16, 17, 33, 64, 100, 3, 9, 20)


def requests(vocab_size: int = 1031) -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, vocab_size, size=24)
    made = []
    for index, kind in enumerate(KINDS):
        tokens = rng.integers(3, vocab_size, size=LENGTHS[index % len(LENGTHS)])
        prompt = np.concatenate([shared, tokens]) if index % 2 else tokens
        params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | kind)
        made.append(
            Request(
                request_id=str(index),
                prompt_token_ids=prompt.astype(np.int32),
                sampling_params=params,
                key=index * 0x9E3779B97F4A7C15 % 2**64,
            )
        )
    return made


def outputs(engine: Engine) -> list[RequestOutput]:
    made = requests()
    for request in made:
        engine.add_request(request)
    found: dict[int, RequestOutput] = {}
    while engine.has_unfinished():
        found |= {int(output.request_id): output for output in engine.step()}
        engine.check_integrity()
    return [found[index] for index in range(len(made))]


def written(results: list[RequestOutput]) -> list[list[list[int]]]:
    return [[one.token_ids for one in result.outputs] for result in results]


def assert_close(maps: Any, expected: Any) -> None:
    for position, other in zip(maps or [], expected or [], strict=True):
        assert (position is None) == (other is None)
        if position is not None:
            assert position.keys() == other.keys()
            values = np.array([[position[token].logprob, other[token].logprob] for token in position])
            np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[..., Path]) -> Callable[[str], tuple[str, list[RequestOutput]]]:
    """Per family: the model, and what one rank writes."""
    cache: dict[str, tuple[str, list[RequestOutput]]] = {}

    def build(family: str) -> tuple[str, list[RequestOutput]]:
        if family not in cache:
            path = str(tiny_model(family, **SIZES))
            cache[family] = path, outputs(Engine(EngineConfig(model=path, device="cpu"), NumberTokenizer()))
        return cache[family]

    return build


def check(family: str, layout: str, settings: dict[str, Any], alone: Callable[[str], Any]) -> None:
    path, expected = alone(family)
    tp_size, pp_size = LAYOUTS[layout]
    config = EngineConfig(
        model=path, device="cpu", tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, **settings
    )
    engine = Engine(config, NumberTokenizer())
    try:
        first = outputs(engine)
        again = outputs(engine)
        stats = engine.stats()
    finally:
        engine.shutdown()
    # The second time, prompts come from the prefix cache.
    for results in (first, again):
        assert written(results) == written(expected)
        for result, other in zip(results, expected, strict=True):
            assert_close(result.prompt_logprobs, other.prompt_logprobs)
            for one, another in zip(result.outputs, other.outputs, strict=True):
                assert_close(one.logprobs, another.logprobs)
    assert any(result.num_cached_tokens for result in again)
    if "num_gpu_blocks_override" in settings:
        assert stats.num_preemptions > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_write_what_one_rank_writes(layout: str, alone: Callable[[str], Any]) -> None:
    family = "qwen3" if layout in ("tp4", "pp3") else "llama"
    check(family, layout, {"max_num_batched_tokens": 32, "max_num_seqs": 16}, alone)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_ranks_write_the_same_when_preempted(layout: str, alone: Callable[[str], Any]) -> None:
    with optimistic_admission(True):
        check("qwen3", layout, {**TIGHT, "max_num_batched_tokens": 9, "steps_ahead": 1}, alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_family_and_layout(family: str, layout: str, alone: Callable[[str], Any]) -> None:
    check(family, layout, {}, alone)
    check(family, layout, {"max_num_batched_tokens": 16, "max_num_seqs": 5, "steps_ahead": 2}, alone)
    with optimistic_admission(True):
        check(family, layout, TIGHT, alone)
