"""Noise, truncation and penalties against their definitions."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from raydata_llm.kernels.sampling import gumbel_noise, penalise_, row_seeds, truncate, truncate_ref

VOCAB = 50
DRAWS = 100_000


def chi_square_p(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() / probabilities.double().sum() * len(tokens)
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("vary", ["position", "key", "high half of the key"])
def test_draws_follow_the_softmax(vary: str) -> None:
    steps, fixed = torch.arange(DRAWS), torch.full((DRAWS,), 77)
    keys = {"position": fixed, "key": steps, "high half of the key": steps << 32}[vary]
    seeds = row_seeds(keys, steps if vary == "position" else fixed)
    logits = logits_of(1)
    tokens = (logits + gumbel_noise(seeds, VOCAB)).argmax(dim=-1)
    assert chi_square_p(tokens, logits[0].softmax(dim=-1)) > 1e-3


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(row_seeds(torch.arange(200), torch.zeros(200, dtype=torch.int64)), 500).flatten()
    assert noise.isfinite().all()
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_neighbouring_keys_and_positions_are_uncorrelated() -> None:
    keys = torch.tensor([0, 1, 2, 0, 0, 1 << 32, -1])
    positions = torch.tensor([0, 0, 0, 1, 2, 0, 0])
    noise = gumbel_noise(row_seeds(keys, positions), 50_000)
    correlation = torch.corrcoef(noise).fill_diagonal_(0).abs().max()
    assert correlation < 5 / 50_000**0.5
    shifted = torch.corrcoef(torch.stack([noise[0, 1:], noise[1, :-1]]))[0, 1].abs()
    assert shifted < 5 / 50_000**0.5


def test_a_rows_noise_does_not_depend_on_its_neighbours() -> None:
    keys, positions = torch.arange(40) * 977, torch.arange(40)
    together = gumbel_noise(row_seeds(keys, positions), 333)
    for row in (0, 17, 39):
        alone = gumbel_noise(row_seeds(keys[row : row + 1], positions[row : row + 1]), 333)
        assert torch.equal(alone[0], together[row])


def test_known_noise_stays_what_it_is() -> None:
    """Pins the stream: seeds in users' datasets must draw the same tokens in every release."""
    seeds = row_seeds(torch.tensor([1, -5]), torch.tensor([0, 9]))
    assert seeds.tolist() == [-7995527694508729151, -2238218926614258209]
    expected = [[3.26264, -0.18636, 2.4007, 2.37876], [-0.17306, 0.64884, 0.6714, 2.27608]]
    torch.testing.assert_close(gumbel_noise(seeds, 4), torch.tensor(expected), atol=1e-4, rtol=0)


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


def brute_force_kept(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    probabilities = logits.double().softmax(dim=-1)
    order = [v for v in logits.argsort(descending=True).tolist() if probabilities[v] >= min_p * probabilities.max()]
    if top_k:
        order = order[:top_k]
    total = sum(float(probabilities[v]) for v in order)
    result, mass = set(), 0.0
    for token in order:
        if top_p < 1 and mass / total >= top_p:
            break
        result.add(token)
        mass += float(probabilities[token])
    return result


@pytest.mark.parametrize("name", ["truncate", "truncate_ref"])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (7, 0.6, 0.0), (20, 0.9, 0.05), (1, 0.01, 0.0)],
)
def test_support_equals_a_sort(name: str, top_k: int, top_p: float, min_p: float) -> None:
    logits = logits_of(2, rows=9)
    arguments = torch.full((9,), top_k), torch.full((9,), top_p), torch.full((9,), min_p)
    function = {"truncate": truncate, "truncate_ref": truncate_ref}[name]
    result = function(logits, *arguments)
    assert kept(result) == [brute_force_kept(row, top_k, top_p, min_p) for row in logits]
    finite = result.isfinite()
    assert torch.equal(result[finite], logits[finite])


def test_rows_of_one_batch_are_truncated_each_by_its_own() -> None:
    logits = logits_of(3, rows=4)
    top_k, top_p = torch.tensor([0, 3, 0, 10]), torch.tensor([1.0, 1.0, 0.5, 0.8])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.1])
    result = truncate(logits, top_k, top_p, min_p)
    rows = zip(logits, top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
    assert kept(result) == [brute_force_kept(row, k, round(p, 6), round(m, 6)) for row, k, p, m in rows]
    assert torch.equal(result, truncate_ref(logits, top_k, top_p, min_p))


def test_a_flat_distribution_keeps_its_whole_vocabulary() -> None:
    logits = torch.zeros((1, 200_000))
    result = truncate(logits, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert result.isfinite().all(), "rounding in a long sum must not cut the tail when top_p is 1"


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, 1.0, 0.5]])
    in_prompt = torch.tensor([[True, True, False, False, False]])
    counts = torch.tensor([[0, 0, 2, 0, 1]])
    result = penalise_(logits.clone(), in_prompt, counts, torch.tensor([0.3]), torch.tensor([0.1]), torch.tensor([2.0]))
    expected = torch.tensor([[1.0, -4.0, 1.5 - 0.2 - 0.3, 1.0, 0.25 - 0.1 - 0.3]])
    torch.testing.assert_close(result, expected)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, tokens = logits_of(5), torch.tensor([[3, 7, 7, 12]])
    expected = RepetitionPenaltyLogitsProcessor(penalty=1.7)(tokens, logits.clone())
    in_prompt = torch.zeros((1, VOCAB), dtype=torch.bool)
    in_prompt[0, [3, 7]] = True
    counts = torch.zeros((1, VOCAB), dtype=torch.int32)
    counts[0, 12] = 1
    zero = torch.zeros(1)
    torch.testing.assert_close(penalise_(logits.clone(), in_prompt, counts, zero, zero, torch.tensor([1.7])), expected)
