"""On a GPU, in bfloat16, the engine is as close to float32 `transformers` as bfloat16 `transformers` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.model]

NUM_ROWS, NUM_TOKENS, TOP = 8, 96, 20


def run(engine: Engine, prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, **params)
        token_ids = np.array(prompt, dtype=np.int32)
        engine.add_request(Request(request_id=str(index), prompt_token_ids=token_ids, sampling_params=sampling))
    outputs: dict[int, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {int(output.request_id): output for output in engine.step()}
    return [outputs[index] for index in range(len(prompts))]


@pytest.fixture(scope="module")
def texts(demo_model: Path) -> list[list[int]]:
    """Token rows that the model itself finds likely: a drawn start, continued by the float32 reference."""
    rng = np.random.default_rng(0)
    starts = torch.tensor(rng.integers(200, 20000, size=(NUM_ROWS, 24)), device="cuda")
    model = load_reference(demo_model, torch.float32)
    with torch.inference_mode():
        rows = model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
        )
    tokens: list[list[int]] = rows.tolist()
    return tokens


@pytest.fixture(scope="module")
def exact(demo_model: Path, texts: list[list[int]]) -> torch.Tensor:
    return reference_logprobs(load_reference(demo_model, torch.float32), texts)


def load_reference(path: Path, dtype: torch.dtype) -> Any:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.to("cuda").eval()


def reference_logprobs(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """[rows, positions, vocab] float32 on the host; position p predicts token p + 1."""
    with torch.inference_mode():
        return torch.stack(
            [model(torch.tensor([row], device="cuda")).logits[0].float().log_softmax(-1).cpu() for row in rows]
        )


def engine_logprobs(engine: Engine, rows: list[list[int]]) -> list[list[dict[int, float]]]:
    """Teacher-forced: each prefix of each row is a prompt, whose one output token carries the logprobs."""
    prefixes = [row[:length] for row in rows for length in range(24, len(row))]
    outputs = run(engine, prefixes, max_tokens=1, logprobs=TOP)
    found = [{token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()} for output in outputs]
    per_row = len(rows[0]) - 24
    return [found[start : start + per_row] for start in range(0, len(found), per_row)]


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix cache", "no prefix cache"])
def test_logprobs_are_as_close_as_transformers_in_bfloat16(
    demo_model: Path, texts: list[list[int]], exact: torch.Tensor, prefix_caching: bool
) -> None:
    engine = Engine(
        EngineConfig(model=str(demo_model), dtype="bfloat16", max_model_len=512, enable_prefix_caching=prefix_caching)
    )
    ours = engine_logprobs(engine, texts)
    theirs = reference_logprobs(load_reference(demo_model, torch.bfloat16), texts)
    our_gaps, their_gaps = [], []
    for row, positions in enumerate(ours):
        for offset, entries in enumerate(positions):
            token_ids = torch.tensor(list(entries))
            wanted = exact[row, 23 + offset, token_ids]
            our_gaps.append((torch.tensor(list(entries.values())) - wanted).abs())
            their_gaps.append((theirs[row, 23 + offset, token_ids] - wanted).abs())
    our_gap, their_gap = torch.cat(our_gaps), torch.cat(their_gaps)
    print(f"mean {our_gap.mean():.4f} / {their_gap.mean():.4f}, max {our_gap.max():.3f} / {their_gap.max():.3f}")
    assert our_gap.mean() <= 1.5 * their_gap.mean()
    assert our_gap.max() <= 1.5 * their_gap.max()


@pytest.mark.parametrize(
    "settings", [{}, {"steps_ahead": 0}, {"max_num_batched_tokens": 48, "max_num_seqs": 5}], ids=str
)
def test_greedy_rows_part_only_at_near_ties(
    demo_model: Path, texts: list[list[int]], exact: torch.Tensor, settings: dict[str, Any]
) -> None:
    engine = Engine(EngineConfig(model=str(demo_model), dtype="bfloat16", max_model_len=512, **settings))
    outputs = run(engine, [row[:24] for row in texts], max_tokens=NUM_TOKENS)
    for row, output in enumerate(outputs):
        written, wanted = output.outputs[0].token_ids, texts[row][24:]
        apart = next((i for i, pair in enumerate(zip(written, wanted, strict=True)) if pair[0] != pair[1]), None)
        if apart is not None:
            logprobs = exact[row, 23 + apart]
            assert logprobs[wanted[apart]] - logprobs[written[apart]] < 0.25
