"""The Triton kernels of sampling against transformers' logits warpers: what they leave, and how often it is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from scipy import stats

VOCAB = 1203
HF: Any = transformers
WARPERS: dict[str, tuple[tuple[int, float, float], list[Any]]] = {
    "top_k": ((20, 1.0, 0.0), [HF.TopKLogitsWarper(20)]),
    "top_p": ((0, 0.8, 0.0), [HF.TopPLogitsWarper(0.8)]),
    "min_p": ((0, 1.0, 0.05), [HF.MinPLogitsWarper(0.05)]),
    # vLLM's order, which is ours: min_p, top_k, then top_p of what is left.
    "all": ((60, 0.9, 0.002), [HF.MinPLogitsWarper(0.002), HF.TopKLogitsWarper(60), HF.TopPLogitsWarper(0.9)]),
}


def warped(warpers: list[Any], logits: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = HF.LogitsProcessorList(warpers)(torch.zeros((len(logits), 1)).long(), logits)
    return scores


@pytest.mark.parametrize("case", WARPERS)
def test_what_is_left_is_transformers(case: str, triton_device: torch.device) -> None:
    from raydata_llm.kernels.truncate_triton import launch_truncate

    values, warpers = WARPERS[case]
    logits = torch.randn((4, VOCAB), generator=torch.Generator().manual_seed(5)) * 3
    cut = (torch.full((4,), value) for value in values)
    result = launch_truncate(logits.to(triton_device), *(tensor.to(triton_device) for tensor in cut)).cpu()
    expected = warped(warpers, logits.clone())
    assert torch.equal(result.isfinite(), expected.isfinite())
    torch.testing.assert_close(result.softmax(-1), expected.softmax(-1), atol=1e-5, rtol=0)


def test_the_repetition_penalty_is_transformers(triton_device: torch.device) -> None:
    from raydata_llm.kernels.penalise_triton import launch_penalise

    logits = torch.randn((3, VOCAB), generator=torch.Generator().manual_seed(6)) * 3
    tokens = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(7))
    in_prompt = torch.zeros((3, VOCAB), dtype=torch.bool).scatter_(1, tokens[:, :25], True)
    counts = torch.zeros((3, VOCAB), dtype=torch.int32)
    counts.scatter_add_(1, tokens[:, 25:], torch.ones((3, 15), dtype=torch.int32))
    device, zeros, by = triton_device, torch.zeros(3, device=triton_device), torch.full((3,), 1.7)
    pools = in_prompt.to(device), counts.to(device), zeros, zeros, by.to(device)
    result = launch_penalise(logits.to(device, copy=True), *pools, None).cpu()
    expected = HF.RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits.clone())
    torch.testing.assert_close(result.softmax(-1), expected.softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [None, "all"], ids=["the whole", "cut"])
def test_draws_follow_transformers_probabilities(case: str | None, triton_device: torch.device) -> None:
    from raydata_llm.kernels.draw_triton import launch_draw
    from raydata_llm.kernels.truncate_triton import launch_cut

    # The interpreter takes 0.3 s a row where there is a cut.
    rows = 60 if triton_device.type == "cpu" else 50_000
    (top_k, top_p, min_p), _ = WARPERS[case] if case else ((0, 1.0, 0.0), [])
    top_k = min(top_k, 7)
    warpers = [HF.TemperatureLogitsWarper(0.7)]
    if case:
        warpers += [HF.MinPLogitsWarper(min_p), HF.TopKLogitsWarper(top_k), HF.TopPLogitsWarper(top_p)]
    logits = torch.randn((1, 11), generator=torch.Generator().manual_seed(8)).expand(rows, -1).contiguous()
    on = [
        tensor.to(triton_device)
        for tensor in (
            logits,
            torch.full((rows,), 0.7),
            torch.full((rows,), top_k),
            torch.full((rows,), top_p),
            torch.full((rows,), min_p),
            torch.arange(rows) * 977,
            torch.full((rows,), 5),
        )
    ]
    drawn = launch_draw(on[0], on[1], on[5], on[6], launch_cut(*on) if case else None).cpu()
    expected = warped(warpers, logits[:1].clone()).softmax(-1)[0].double() * rows
    counts = torch.bincount(drawn, minlength=11).double()
    assert not counts[expected == 0].any()
    left = expected > 0
    assert stats.chisquare(counts[left].numpy(), (expected[left] * rows / expected[left].sum()).numpy()).pvalue > 1e-3
