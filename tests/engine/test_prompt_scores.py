"""Log-probabilities of named tokens at a prompt's positions equal transformers', however it is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine import logprobs
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.prompt_scores import PromptScores
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.optimism import optimistic_admission

VOCAB = 1031
PROMPTS = [[(7 * i + 3) % VOCAB for i in range(length)] for length in (1, 2, 40, 70, 40, 23)]
IDS = [5, 1030, 77, 5]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "launched ahead": {"steps_ahead": 2, "max_num_batched_tokens": 24, "max_num_seqs": 4},
}


@pytest.fixture(scope="module")
def model_path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", num_attention_heads=8))


@pytest.fixture(scope="module")
def reference(model_path: str) -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities of what follows each of some tokens but the last, [T - 1, V]."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path).eval()

    def of(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            log_softmax: torch.Tensor = model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
        return log_softmax[:-1]

    return of


def run(engine: Engine, prompts: list[list[int]], each: list[dict[str, Any]]) -> list[RequestOutput]:
    for index, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
        token_ids = np.array(prompt, dtype=np.int32)
        sampling_params = SamplingParams(**({"temperature": 0.0, "max_tokens": 3} | params))
        engine.add_request(Request(request_id=str(index), prompt_token_ids=token_ids, sampling_params=sampling_params))
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    return [outputs[str(index)] for index in range(len(prompts))]


def assert_scores(output: RequestOutput, expected: torch.Tensor) -> None:
    found = output.prompt_token_id_logprobs
    assert found is not None and found.dtype == np.float32 and found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_one_list_for_all_positions(
    way: str, model_path: str, reference: Callable[[list[int]], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces of 7 positions: chunks of prompts end within and between them.
    monkeypatch.setattr(logprobs, "_PIECE_LOGITS", 7 * VOCAB)
    engine = Engine(EngineConfig(model=model_path, device="cpu", **WAYS[way]))
    starts = [0, 1, 33, None, 5, 22]
    each = [{"prompt_logprob_token_ids": IDS, "prompt_logprob_start": start} for start in starts]
    # The second time what is cached must not keep positions from being computed.
    first, again = run(engine, PROMPTS, each), run(engine, PROMPTS, each)
    for outputs in (first, again):
        for prompt, start, output in zip(PROMPTS, starts, outputs, strict=True):
            assert_scores(output, reference(prompt)[start or 0 :, IDS])
            assert output.prompt_logprobs is None
    if way in ("plain", "launched ahead"):
        # What lies before the first position may come from the cache: blocks of 16.
        assert [output.num_cached_tokens for output in again] == [0, 0, 32, 0, 0, 16]


@pytest.mark.parametrize("way", WAYS)
def test_a_list_for_each_position(
    way: str, model_path: str, reference: Callable[[list[int]], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_PIECE_LOGITS", 7 * VOCAB)
    engine = Engine(EngineConfig(model=model_path, device="cpu", **WAYS[way]))
    rng, each, expected = np.random.default_rng(1), list[dict[str, Any]](), []
    for prompt in PROMPTS[1:]:
        start = len(prompt) // 3
        rows = [rng.integers(0, VOCAB, rng.integers(0, 5)).tolist() for _ in range(len(prompt) - 1 - start)]
        rows[0] = [3, -1, 9, 4]
        each.append({"prompt_logprob_token_ids": rows, "prompt_logprob_start": start, "prompt_logprobs": 1})
        scores = torch.full((len(rows), 4), float("-inf"))
        for row, ids in enumerate(rows):
            for place, token_id in enumerate(ids):
                if token_id >= 0:
                    scores[row, place] = reference(prompt)[start + row, token_id]
        expected.append(scores)
    for prompt, output, scores in zip(PROMPTS[1:], run(engine, PROMPTS[1:], each), expected, strict=True):
        assert_scores(output, scores)
        # What is asked beside it is not changed by it.
        positions = output.prompt_logprobs
        assert positions is not None and len(positions) == len(prompt)
        for position, entries in enumerate(positions):
            if entries is not None:
                top = int(reference(prompt)[position - 1].argmax())
                assert entries.keys() == {prompt[position], top}


def test_scores_survive_preemption_and_change_no_output(
    model_path: str, reference: Callable[[list[int]], torch.Tensor]
) -> None:
    tight: dict[str, Any] = {"max_model_len": 120, "block_size": 5, "num_gpu_blocks_override": 26, "max_num_seqs": 6}
    asked: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "n": 2, "ignore_eos": True}
    with optimistic_admission():
        engine = Engine(EngineConfig(model=model_path, device="cpu", max_num_batched_tokens=32, **tight))
        outputs = run(engine, PROMPTS, [asked | {"prompt_logprob_token_ids": IDS}] * len(PROMPTS))
        assert engine.stats().num_preemptions > 0
        plain = run(engine, PROMPTS, [asked] * len(PROMPTS))
    for prompt, output, other in zip(PROMPTS, outputs, plain, strict=True):
        assert_scores(output, reference(prompt)[:, IDS])
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in other.outputs]
        assert other.prompt_token_id_logprobs is None


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_ranks_score_the_same(
    layout: tuple[int, int], model_path: str, reference: Callable[[list[int]], torch.Tensor]
) -> None:
    tp_size, pp_size = layout
    sizes: dict[str, Any] = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}
    engine = Engine(EngineConfig(model=model_path, device="cpu", max_num_batched_tokens=16, max_num_seqs=4, **sizes))
    rows = [[row, -1] for row in range(10)]
    each: list[dict[str, Any]] = [
        {"prompt_logprob_token_ids": IDS},
        {"prompt_logprob_token_ids": np.array(rows), "prompt_logprob_start": 12},
    ]
    try:
        fixed, by_row = run(engine, [PROMPTS[2], PROMPTS[5]], each)
    finally:
        engine.shutdown()
    assert_scores(fixed, reference(PROMPTS[2])[:, IDS])
    expected = torch.full((10, 2), float("-inf"))
    expected[:, 0] = reference(PROMPTS[5])[12:].gather(1, torch.arange(10)[:, None])[:, 0]
    assert_scores(by_row, expected)


def test_a_truncated_prompt_is_scored_as_it_is_run(
    model_path: str, reference: Callable[[list[int]], torch.Tensor]
) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    [output] = run(engine, [PROMPTS[3]], [{"prompt_logprob_token_ids": [9], "truncate_prompt_tokens": 30}])
    assert_scores(output, reference(PROMPTS[3][-30:])[:, [9]])


def test_a_prompt_of_embeddings_is_scored_too(model_path: str, reference: Callable[[list[int]], torch.Tensor]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_path)
    table = model.get_input_embeddings().weight.detach().numpy()
    engine = Engine(EngineConfig(model=model_path, device="cpu", enable_prompt_embeds=True))
    params = SamplingParams(max_tokens=1, prompt_logprob_token_ids=IDS)
    engine.add_request(Request(request_id="a", prompt_embeds=table[PROMPTS[2]], sampling_params=params))
    [output] = engine.step()
    assert_scores(output, reference(PROMPTS[2])[:, IDS])


def test_an_aborted_prompt_has_no_part_of_a_matrix(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", max_num_batched_tokens=16, max_num_seqs=4))
    params = SamplingParams(prompt_logprob_token_ids=IDS)
    engine.add_request(Request(request_id="a", prompt_token_ids=np.array(PROMPTS[3], np.int32), sampling_params=params))
    engine.step()
    [output] = engine.abort_all()
    assert output.prompt_token_id_logprobs is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"prompt_logprob_token_ids": [[1], [2]]}, "has 2 rows where the prompt of 2 tokens has 1 positions"),
        ({"prompt_logprob_token_ids": [1], "prompt_logprob_start": 2}, "prompt_logprob_start=2 is outside the prompt"),
        ({"prompt_logprob_token_ids": [VOCAB]}, f"prompt_logprob_token_ids names token {VOCAB}, outside the vocab"),
        (
            {"prompt_logprob_token_ids": [[3, VOCAB]]},
            f"prompt_logprob_token_ids names token {VOCAB}, outside the vocab",
        ),
    ],
)
def test_what_does_not_fit_the_prompt_is_refused(params: dict[str, Any], message: str, model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    with pytest.raises(ValueError, match=message):
        run(engine, [PROMPTS[1]], [params])
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    "params",
    [
        {"prompt_logprob_token_ids": []},
        {"prompt_logprob_token_ids": "ab"},
        {"prompt_logprob_token_ids": 3},
        {"prompt_logprob_token_ids": [-1]},
        {"prompt_logprob_token_ids": [[-2]]},
        {"prompt_logprob_token_ids": [[1.5]]},
        {"prompt_logprob_token_ids": [1, [2]]},
        {"prompt_logprob_start": 3},
        {"prompt_logprob_start": -1, "prompt_logprob_token_ids": [1]},
    ],
    ids=str,
)
def test_what_is_no_list_of_tokens_is_named(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        SamplingParams(**params)


@pytest.mark.parametrize("ids", [[1, 2], [[1, -1], [2, 3]]], ids=str)
def test_parameters_survive_json_and_arrays(ids: list[Any]) -> None:
    array: Any = np.array(ids)
    params = SamplingParams(prompt_logprob_token_ids=array, prompt_logprob_start=1)
    assert SamplingParams(prompt_logprob_token_ids=ids, prompt_logprob_start=1) == params
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params
    assert params.to_mapping() == {"prompt_logprob_token_ids": ids, "prompt_logprob_start": 1}


def test_positions_computed_again_replace_the_first_ones() -> None:
    scores = PromptScores(SamplingParams(prompt_logprob_token_ids=[3, 4], prompt_logprob_start=2), 6)
    scores.put(0, np.full((4, 2), 7.0))
    assert not scores.is_complete and scores.values is None
    scores.put(3, np.full((2, 2), 8.0))
    assert scores.values is not None and scores.values.tolist() == [[7, 7], [8, 8], [8, 8]]
