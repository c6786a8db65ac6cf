"""The Triton kernels of sampling, against the torch operations that define them."""

from __future__ import annotations

import pytest
import torch

from raydata_llm.kernels.sampling import penalise_, sample, truncate_ref

VOCAB = 5003
ROWS = 6


def logits_of(seed: int, rows: int = ROWS, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * spread


def full(value: float, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> torch.Tensor:
    return torch.full((rows,), value, dtype=dtype)


def test_greedy_takes_the_lowest_of_the_likeliest(triton_dtype: torch.dtype, triton_device: torch.device) -> None:
    from raydata_llm.kernels.draw_triton import launch_greedy

    logits = logits_of(1).to(triton_dtype)
    logits[0, [4000, 2500, 77]] = 30.0
    logits[1] = float("-inf")
    logits[2, 5] = float("nan")
    expected = logits.nan_to_num(float("-inf")).argmax(dim=-1).tolist()
    assert expected[:2] == [77, 0]
    assert launch_greedy(logits.to(triton_device)).tolist() == expected


def test_greedy_of_rows_that_fill_the_chip(triton_device: torch.device) -> None:
    from raydata_llm.kernels.draw_triton import launch_greedy

    rows = 9 if triton_device.type == "cpu" else 3000
    logits = logits_of(2, rows=rows, vocab=700)
    # A view: rows further apart than they are long.
    assert launch_greedy(logits.to(triton_device)[:, :611]).tolist() == logits[:, :611].argmax(dim=-1).tolist()


@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["noise alone", "logits and noise"])
def test_draws_are_those_of_the_torch_noise(spread: float, triton_device: torch.device) -> None:
    from raydata_llm.kernels.draw_triton import launch_draw

    rows = 40
    logits = logits_of(3, rows=rows, spread=spread, vocab=1501)
    keys = torch.arange(rows) * 0x123456789ABCDEF - 2**62
    positions = torch.arange(rows) * 7
    none = (full(0, torch.int64, rows), full(1, rows=rows), full(0, rows=rows))
    temperature = full(0.7, rows=rows)
    temperature[3] = 0.0
    expected = sample(logits, temperature, *none, keys, positions)
    device = triton_device
    result = launch_draw(logits.to(device), temperature.to(device), keys.to(device), positions.to(device))
    assert result.tolist() == expected.tolist()


CUTS = [
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.1),
    (50, 0.6, 0.0),
    (200, 0.95, 0.02),
    (1, 0.01, 0.0),
    (3000, 1.0, 0.0),
    (VOCAB + 1, 1.0, 0.0),
    (0, 0.8, 0.3),
    (0, 1.0, 0.0),
]


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set((row > float("-inf")).nonzero().flatten().tolist()) for row in logits.cpu()]


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), CUTS)
def test_truncation_keeps_what_a_sort_keeps(
    top_k: int, top_p: float, min_p: float, spread: float, triton_device: torch.device
) -> None:
    from raydata_llm.kernels.truncate_triton import launch_truncate

    rows = 1 if triton_device.type == "cpu" else ROWS
    logits = logits_of(4, rows, spread)
    arguments = full(top_k, torch.int64, rows), full(top_p, rows=rows), full(min_p, rows=rows)
    expected = truncate_ref(logits, *arguments)
    result = launch_truncate(logits.to(triton_device), *(tensor.to(triton_device) for tensor in arguments)).cpu()
    assert same_but_for_rounding(kept(result), kept(expected), logits, top_p)
    finite = result > float("-inf")
    assert torch.equal(result[finite], logits[finite])


def same_but_for_rounding(result: list[set[int]], expected: list[set[int]], logits: torch.Tensor, top_p: float) -> bool:
    """Sets equal, or of sizes that differ by the token where float32 sums cross top_p."""
    allowed = 1 if top_p < 1 and logits.std() > 1 else 0 if top_p == 1 else 2
    return all(len(a ^ b) <= allowed for a, b in zip(result, expected, strict=True))


def test_truncation_of_16_bit_logits_with_many_equals(triton_device: torch.device) -> None:
    from raydata_llm.kernels.truncate_triton import launch_truncate

    logits = (logits_of(5, 3, 1.0) * 4).round() / 4
    top_k, top_p = torch.tensor([40, 0, 100]), torch.tensor([1.0, 0.5, 0.5])
    device = triton_device
    result = launch_truncate(logits.half().to(device), top_k.to(device), top_p.to(device), full(0, rows=3).to(device))
    expected = truncate_ref(logits, top_k, top_p, full(0, rows=3))
    for mine, reference, row in zip(kept(result), kept(expected), logits, strict=True):
        # Which of the equals stay is a sort's own affair; how many, and that it is the lowest, is ours.
        pivot = min(row[token] for token in mine)
        assert abs(len(mine) - len(reference)) <= (1 if len(reference) > 100 else 0)
        ties = (row == pivot).nonzero().flatten().tolist()
        assert sorted(token for token in mine if row[token] == pivot) == ties[: len(mine & set(ties))]
        assert {token for token in mine if row[token] > pivot} == set((row > pivot).nonzero().flatten().tolist())


def test_equal_logits_are_cut_to_their_share(triton_device: torch.device) -> None:
    from raydata_llm.kernels.truncate_triton import launch_truncate

    logits = torch.zeros((4, VOCAB), device=triton_device)
    top_k = torch.tensor([7, 0, 0, 9], device=triton_device)
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.7], device=triton_device)
    result = launch_truncate(logits, top_k, top_p, torch.zeros(4, device=triton_device))
    assert kept(result) == [set(range(number)) for number in (7, (VOCAB + 1) // 2, VOCAB, 7)]


def test_what_min_p_drops_weighs_nothing_in_top_p(triton_device: torch.device) -> None:
    """More candidates than are listed, and a min_p between the two float16 values that occur."""
    from raydata_llm.kernels.truncate_triton import launch_truncate

    logits = torch.full((1, VOCAB), 1.0 - 2**-11)
    logits[:, 100:4600] = 1.0
    arguments = torch.tensor([4800]), torch.tensor([0.9]), torch.tensor([0.9997])
    on = (tensor.to(triton_device) for tensor in (logits.half(), *arguments))
    assert kept(launch_truncate(*on)) == [set(range(100, 100 + 4050))]


def test_rows_of_all_kinds_in_one_launch(triton_device: torch.device) -> None:
    from raydata_llm.kernels.draw_triton import launch_draw
    from raydata_llm.kernels.truncate_triton import launch_cut

    logits = logits_of(6, 8)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.8, 1.5, 0.0, 1.0])
    top_k = torch.tensor([0, 0, 50, 0, 20, 3, 5, 1])
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.8, 1.0, 0.5, 0.5, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.01, 0.1, 0.0, 0.1, 0.0])
    keys, positions = torch.arange(8) << 33, torch.arange(8)
    expected = sample(logits, temperature, top_k, top_p, min_p, keys, positions)
    on = [tensor.to(triton_device) for tensor in (logits, temperature, top_k, top_p, min_p, keys, positions)]
    cut = launch_cut(*on[:5])
    assert launch_draw(on[0], on[1], on[5], on[6], cut).tolist() == expected.tolist()


@pytest.mark.parametrize("pooled", [False, True])
def test_penalties(pooled: bool, triton_device: torch.device) -> None:
    from raydata_llm.kernels.penalise_triton import launch_penalise

    generator = torch.Generator().manual_seed(7)
    logits, pool = logits_of(8), 4 if pooled else ROWS
    in_prompt = torch.rand((pool, VOCAB), generator=generator) < 0.2
    counts = torch.randint(0, 3, (pool, VOCAB), generator=generator, dtype=torch.int32)
    values = torch.rand((3, pool), generator=generator) + 0.5
    pool_rows = torch.tensor([2, -1, 0, 3, -1, 1]) if pooled else None
    expected = penalise_(logits.clone(), in_prompt, counts, values[0], values[1], values[2], pool_rows)
    device = triton_device
    on_device, pool_rows = logits.to(device, copy=True), None if pool_rows is None else pool_rows.to(device)
    pools = (in_prompt.to(device), counts.to(device), values[0].to(device), values[1].to(device), values[2].to(device))
    result = launch_penalise(on_device, *pools, pool_rows)
    assert result is on_device
    torch.testing.assert_close(result.cpu(), expected)
    if pooled:
        assert torch.equal(result[1].cpu(), logits[1])
