"""Log-probabilities of prompts and outputs equal transformers', whatever way the prompt is computed."""

from __future__ import annotations

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
from raydata_llm.engine.request import Logprob, Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.optimism import optimistic_admission

VOCAB = 1031
PROMPTS = [[(7 * i + 3) % VOCAB for i in range(length)] for length in (1, 2, 40, 70, 40, 23)]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "launched ahead": {"steps_ahead": 2, "max_num_batched_tokens": 24, "max_num_seqs": 4},
}


@pytest.fixture(scope="module")
def model_path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def reference(model_path: str) -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities of what follows each of some tokens, [T, V]."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path).eval()

    def of(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            log_softmax: torch.Tensor = model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
        return log_softmax

    return of


def run(engine: Engine, prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
    sampling_params = SamplingParams(**({"temperature": 0.0, "max_tokens": 3} | params))
    for index, prompt in enumerate(prompts):
        token_ids = np.array(prompt, dtype=np.int32)
        engine.add_request(
            Request(request_id=str(index), prompt_token_ids=token_ids, sampling_params=sampling_params, key=index)
        )
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    return [outputs[str(index)] for index in range(len(prompts))]


def check_position(found: dict[int, Logprob], token_id: int, expected: torch.Tensor, others: set[int]) -> None:
    assert set(found) == {token_id} | others
    for one, entry in found.items():
        assert entry.logprob == pytest.approx(float(expected[one]), abs=1e-3)
        if entry.rank is not None:
            assert entry.rank == int((expected > expected[one]).sum()) + 1


@pytest.mark.parametrize("way", WAYS)
def test_prompt_logprobs_equal_transformers(
    way: str, model_path: str, reference: Callable[[list[int]], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces of 7 positions: chunks of prompts end within and between them.
    monkeypatch.setattr(logprobs, "_PIECE_LOGITS", 7 * VOCAB)
    engine = Engine(EngineConfig(model=model_path, device="cpu", **WAYS[way]))
    # The second time what is cached must not keep positions from being computed.
    for outputs in (run(engine, PROMPTS, prompt_logprobs=2), run(engine, PROMPTS, prompt_logprobs=2)):
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            found = output.prompt_logprobs
            assert found is not None and len(found) == len(prompt)
            assert found[0] is None
            expected = reference(prompt)
            for position in range(1, len(prompt)):
                top = set(expected[position - 1].topk(2).indices.tolist())
                entries = found[position]
                assert entries is not None
                check_position(entries, prompt[position], expected[position - 1], top)
    engine.check_integrity()


def test_prompt_logprobs_do_not_change_the_outputs(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    plain = [one.outputs[0].token_ids for one in run(engine, PROMPTS, temperature=1.0)]
    asked = [one.outputs[0].token_ids for one in run(engine, PROMPTS, temperature=1.0, prompt_logprobs=0)]
    assert plain == asked


def test_prompt_logprobs_survive_preemption(model_path: str, reference: Callable[[list[int]], torch.Tensor]) -> None:
    tight: dict[str, Any] = {"max_model_len": 120, "block_size": 5, "num_gpu_blocks_override": 26, "max_num_seqs": 6}
    with optimistic_admission():
        engine = Engine(EngineConfig(model=model_path, device="cpu", max_num_batched_tokens=32, **tight))
        outputs = run(engine, PROMPTS, prompt_logprobs=0, max_tokens=40, n=2, temperature=1.0)
    assert engine.stats().num_preemptions > 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected, found = reference(prompt), output.prompt_logprobs
        assert found is not None and len(found) == len(prompt)
        for position in range(1, len(prompt)):
            entries = found[position]
            assert entries is not None
            check_position(entries, prompt[position], expected[position - 1], set())


def test_all_logprobs_are_a_distribution(model_path: str, reference: Callable[[list[int]], torch.Tensor]) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    output = run(engine, [PROMPTS[2]], logprobs=-1, prompt_logprobs=-1)[0]
    found = output.outputs[0].logprobs
    assert found is not None and output.prompt_logprobs is not None
    expected = reference(PROMPTS[2] + output.outputs[0].token_ids)
    for position, entries in enumerate([*output.prompt_logprobs[1:], *found]):
        assert entries is not None
        values = torch.tensor([entries[token_id].logprob for token_id in range(VOCAB)])
        assert torch.allclose(values, expected[position], atol=1e-3)


def test_logprobs_of_named_tokens(model_path: str, reference: Callable[[list[int]], torch.Tensor]) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    for named in ([5, 1030, 77], [9]):
        output = run(engine, [PROMPTS[3]], logprob_token_ids=named)[0].outputs[0]
        expected = reference(PROMPTS[3] + output.token_ids)[len(PROMPTS[3]) - 1 :]
        assert output.logprobs is not None and len(output.logprobs) == 3
        for position, entries in enumerate(output.logprobs):
            check_position(entries, output.token_ids[position], expected[position], set(named))
        assert output.cumulative_logprob == pytest.approx(
            sum(float(expected[i, token]) for i, token in enumerate(output.token_ids)), abs=1e-3
        )


@pytest.mark.parametrize(
    "params",
    [{"logprobs": -2}, {"prompt_logprobs": -3}, {"logprob_token_ids": []}, {"logprob_token_ids": list(range(129))}],
    ids=str,
)
def test_wrong_counts_are_named(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        SamplingParams(**params)


def test_a_named_token_outside_the_vocabulary_is_refused(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu"))
    with pytest.raises(ValueError, match="logprob_token_ids names token 1031"):
        run(engine, [[1, 2]], logprob_token_ids=[VOCAB])


@pytest.mark.model
def test_the_demos_model_has_transformers_logprobs(demo_model: Path, demo_reference: Any) -> None:
    engine = Engine(EngineConfig(model=str(demo_model), device="cpu", dtype="float32", max_model_len=256))
    prompts = [[(911 * i + 17) % 49000 for i in range(length)] for length in (30, 71)]
    for prompt, output in zip(prompts, run(engine, prompts, max_tokens=8, logprobs=3, prompt_logprobs=3), strict=True):
        tokens = prompt + output.outputs[0].token_ids
        with torch.inference_mode():
            expected = demo_reference(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        found = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        assert len(found) == len(tokens) - 1
        for position, entries in enumerate(found):
            assert entries is not None and tokens[position + 1] in entries
            for token_id, entry in entries.items():
                assert entry.logprob == pytest.approx(float(expected[position, token_id]), abs=1e-3)
