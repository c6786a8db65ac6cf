"""The demo's model, whose 9 heads three ranks can share: the same greedy tokens over ranks as from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.optimism import optimistic_admission

pytestmark = pytest.mark.model

MAX_TOKENS = 12
# Chunks of prompts, a prefix cache that is met, and so few blocks that rows are preempted.
TIGHT: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 6, "num_gpu_blocks_override": 14}


def outputs(model: Path, **settings: Any) -> list[RequestOutput]:
    config = EngineConfig(model=str(model), device="cpu", dtype="float32", max_model_len=96, block_size=8, **settings)
    engine = Engine(config)
    rng = np.random.default_rng(3)
    shared = rng.integers(200, 20000, size=16)
    found: dict[str, RequestOutput] = {}
    try:
        for index in range(6):
            own = rng.integers(200, 20000, size=3 + 7 * index)
            prompt = (np.concatenate([shared, own]) if index % 2 else own).astype(np.int32)
            params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
            engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params))
        while engine.has_unfinished():
            found |= {output.request_id: output for output in engine.step()}
            engine.check_integrity()
        if "num_gpu_blocks_override" in settings:
            assert engine.stats().num_preemptions > 0
    finally:
        engine.shutdown()
    return [found[str(index)] for index in range(6)]


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> list[RequestOutput]:
    return outputs(demo_model)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 3},
        pytest.param({"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline_parallel_size": 3}, marks=pytest.mark.slow),
        pytest.param({"tensor_parallel_size": 3, "pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_demos_model_over_ranks_writes_what_one_rank_writes(
    demo_model: Path, expected: list[RequestOutput], sizes: dict[str, int]
) -> None:
    with optimistic_admission(True):
        results = outputs(demo_model, **sizes, **TIGHT)
    for result, other in zip(results, expected, strict=True):
        one, another = result.outputs[0], other.outputs[0]
        assert one.token_ids == another.token_ids
        for position, same in zip(one.logprobs or [], another.logprobs or [], strict=True):
            for token in position:
                assert abs(position[token].logprob - same[token].logprob) < 1e-3


@pytest.mark.parametrize("tp_size", [2, 4])
def test_its_nine_heads_are_not_shared_by_two_or_four(demo_model: Path, tp_size: int) -> None:
    said = rf"tensor_parallel_size={tp_size} does not divide num_attention_heads=9, num_key_value_heads=3 .* 1, 3$"
    with pytest.raises(ValueError, match=said):
        Engine(EngineConfig(model=str(demo_model), device="cpu", tensor_parallel_size=tp_size))
