"""The Triton kernels of sampling, against the torch operations that define them."""

from __future__ import annotations

import math

import pytest
import torch

from raydata_llm.kernels.bitmask import apply_bitmask_ref_
from raydata_llm.kernels.logprobs import HEAD, logprob_records, logprob_records_ref
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


def test_draws_of_the_parts_of_a_vocabulary_have_its_noise(triton_device: torch.device) -> None:
    from raydata_llm.kernels.draw_triton import launch_draw

    rows, first = 12, 600
    logits = logits_of(3, rows=rows, spread=2.0, vocab=1501)
    keys, positions = torch.arange(rows) * 0x123456789ABCDEF - 2**62, torch.arange(rows) * 7
    none = (full(0, torch.int64, rows), full(1, rows=rows), full(0, rows=rows))
    temperature = full(0.7, rows=rows)
    temperature[3] = 0.0
    banned = logits.clone()
    banned[:, :first] = float("-inf")
    expected = sample(banned, temperature, *none, keys, positions) - first
    part = logits[:, first:]
    assert torch.equal(
        sample(part, temperature, *none, keys, positions, any_truncated=False, first_token=first), expected
    )
    on = [value.to(triton_device) for value in (part.contiguous(), temperature, keys, positions)]
    assert launch_draw(on[0], on[1], on[2], on[3], first_token=first).tolist() == expected.tolist()


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
    cut = launch_cut(*on)
    assert launch_draw(on[0], on[1], on[5], on[6], cut).tolist() == expected.tolist()


def tokens_of(device: torch.device, logits: torch.Tensor, *parameters: torch.Tensor) -> list[int]:
    """`sampling.sample` as it launches on a GPU."""
    from raydata_llm.kernels.draw_triton import launch_draw
    from raydata_llm.kernels.truncate_triton import launch_cut

    temperature, *_, keys, positions = on = [tensor.to(device) for tensor in parameters]
    logits = logits.to(device) if logits.device != device else logits
    return launch_draw(logits, temperature, keys, positions, launch_cut(logits, *on)).tolist()


def same_rows(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """Logits and the parameters of rows of one kind, keyed each by its own key."""
    rows = len(logits)
    cut = full(top_k, torch.int64, rows), full(top_p, rows=rows), full(min_p, rows=rows)
    return logits, full(temperature, rows=rows), *cut, torch.arange(rows) * 7919 - 3, torch.arange(rows) * 5


DRAWS = {
    "top_k": (0.8, 50, 1.0, 0.0),
    "top_k and top_p": (0.8, 50, 0.95, 0.0),
    "all three": (1.3, 200, 0.9, 0.02),
    "top_k 1": (1.0, 1, 1.0, 0.0),
    "more than the stretches": (2.0, 1000, 0.99, 0.0),
    "more than are listed": (3.0, 2500, 1.0, 0.0),
    "the vocabulary": (1.0, VOCAB, 0.9, 0.0),
    "top_p": (0.6, 0, 0.9, 0.0),
    "flat top_p": (5.0, 0, 0.9, 0.0),
    "all but nothing in top_p": (1.0, 0, 0.9999, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
    "flat min_p": (9.0, 0, 1.0, 0.1),
    "min_p and top_p": (1.0, 0, 0.8, 0.01),
    "cold": (1e-3, 50, 0.95, 0.0),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_of_cut_rows_are_those_of_a_sort(kind: str, triton_device: torch.device) -> None:
    for vocab in (VOCAB, 31):
        rows = same_rows(logits_of(9, 3 if triton_device.type == "cpu" else 60, vocab=vocab), *DRAWS[kind])
        assert tokens_of(triton_device, *rows) == sample(*rows).tolist(), vocab


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (VOCAB, 0.5), (0, 0.5), (900, 0.9), (4000, 0.9), (1, 1.0)])
def test_draws_from_equal_logits(top_k: int, top_p: float, triton_device: torch.device) -> None:
    """Every logit is a candidate: the whole row is searched, and the lowest tokens stay."""
    rows = same_rows(torch.full((2, VOCAB), -2.5), 0.7, top_k, top_p)
    number = math.ceil(min(top_k or VOCAB, VOCAB) * torch.tensor(top_p).item())
    only = rows[0].index_fill(1, torch.arange(number, VOCAB), float("-inf"))
    assert tokens_of(triton_device, *rows) == sample(only, rows[1], *same_rows(only, 0.7, 0, 1.0)[2:]).tolist()


@pytest.mark.parametrize("place", ["in the list", "in the whole row"])
def test_of_equals_at_the_cut_the_lowest_are_drawn(
    place: str, triton_device: torch.device, triton_dtype: torch.dtype
) -> None:
    """Two likelier tokens, then equals in many stretches, of which three are left."""
    logits = logits_of(10, 6 if triton_device.type == "cpu" else 60, 1.0).clamp(max=2.0)
    ties = torch.arange(3, VOCAB, 97 if place == "in the list" else 2)
    logits[:, ties] = 5.5
    logits[:, [4700, 12]] = 6.0
    only = torch.full_like(logits, float("-inf"))
    kept = torch.cat([torch.tensor([12, 4700]), ties[:3]])
    only[:, kept] = logits[:, kept]
    logits, only = logits.to(triton_dtype), only.to(triton_dtype).float()
    rows = same_rows(logits, 2.0, 5, 0.999)
    drawn = tokens_of(triton_device, *rows)
    assert drawn == sample(only, *same_rows(only, 2.0, 0, 1.0)[1:]).tolist()
    assert set(drawn) & set(ties.tolist()), "no tie was drawn"


def test_rows_of_few_finite_logits(triton_device: torch.device) -> None:
    logits = torch.full((4, VOCAB), float("-inf"))
    logits[1, 4242] = -1e4
    logits[2:, [3, 170, 171, 5000]] = torch.tensor([-1.0, 2.0, 2.0, 0.5])
    for parameters in ((1.0, 50, 0.95), (1.0, 2, 1.0), (1.0, 0, 0.6), (1.0, VOCAB - 1, 1.0), (1.0, 0, 1.0, 0.3)):
        rows = same_rows(logits, *parameters)
        drawn = tokens_of(triton_device, *rows)
        assert drawn == sample(*rows).tolist()
        assert drawn[:2] == [0, 4242]


@pytest.mark.parametrize(("vocab", "stride"), [(5003, 5003), (4999, 5120), (17, 33), (8192, 8192), (1, 7)])
def test_odd_sizes_and_rows_further_apart_than_they_are_long(
    vocab: int, stride: int, triton_device: torch.device, triton_dtype: torch.dtype
) -> None:
    whole = logits_of(11, 3, vocab=stride).to(triton_dtype)
    whole[:, vocab:] = 100.0
    rows = same_rows(whole[:, :vocab].float(), 0.8, 50, 0.95)
    # On the device still a view.
    assert tokens_of(triton_device, whole.to(triton_device)[:, :vocab], *rows[1:]) == sample(*rows).tolist()


def test_a_row_draws_the_same_with_or_without_a_list(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydata_llm.kernels import candidates_triton

    logits = (logits_of(12, 8) * 4).round() / 4
    top_k, top_p = torch.tensor([50, 9, 300, 0, 0, 40, 7, 0]), torch.tensor([0.95, 1.0, 0.9, 0.8, 0.6, 0.5, 0.7, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.1])
    rows = (logits, full(0.9, rows=8), top_k, top_p, min_p, torch.arange(8) << 40, torch.arange(8))
    listed = tokens_of(triton_device, *rows)
    monkeypatch.setattr(candidates_triton, "_ROOM", 1)
    assert tokens_of(triton_device, *rows) == listed


def test_rows_of_few_candidates_are_drawn_from_a_list(triton_device: torch.device) -> None:
    """And not from the whole row: after them nothing is left to search or to draw."""
    from raydata_llm.kernels.candidates_triton import PENDING, launch_candidates

    kinds = [DRAWS[kind] for kind in ("top_k and top_p", "all three", "top_p", "min_p", "flat top_p", "flat min_p")]
    logits = logits_of(13, len(kinds))
    columns = [torch.tensor(column) for column in zip(*kinds, strict=True)]
    on = [tensor.to(triton_device) for tensor in (logits, *columns, torch.arange(6), torch.arange(6))]
    found, _ = launch_candidates(*on)
    assert (found.drawn != PENDING.value).tolist() == [True] * 4 + [False] * 2
    assert (found.tie_end != PENDING.value).tolist() == [True] * 4 + [False, True]


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


@pytest.mark.parametrize("picked", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize(("vocab", "k"), [(VOCAB, 0), (VOCAB, 5), (4096, 40), (31, 31), (31, 4)])
def test_logprobs_ranks_and_the_likeliest(
    vocab: int, k: int, picked: bool, triton_dtype: torch.dtype, triton_device: torch.device
) -> None:
    from raydata_llm.kernels.logprobs_triton import launch_logprob_records

    logits = logits_of(21, vocab=vocab).to(triton_dtype)
    logits[1, ::2] = float("-inf")
    logits[2] = 4.0
    logits[3, 3:] = float("-inf")
    # Many that are equal, whose order is that of their tokens; some of them in one lane.
    logits[4] = (logits[4] / 3).round()
    # So far above the row's own token that no sum relative to that is a number.
    logits[5, [min(one, vocab - 1) for one in (7, 2055, 4103, 9)]] = 140.0
    rows = torch.tensor([4, 0, 5, 1]) if picked else None
    own = torch.tensor([0, 1, 17, 2, vocab - 1, vocab // 2])[: len(logits) if rows is None else len(rows)]
    expected = logprob_records_ref(logits, own, k, rows)
    of = None if rows is None else rows.to(triton_device)
    found = launch_logprob_records(logits.to(triton_device), own.to(triton_device), k, of)
    words = found.words.cpu()
    assert torch.equal(words[:, 1], expected.words[:, 1])
    assert torch.equal(words[:, HEAD::2], expected.words[:, HEAD::2])
    for start in (0, HEAD + 1):
        pair = (one[:, start::2].contiguous().view(torch.float32) for one in (words, expected.words))
        torch.testing.assert_close(*pair, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.log_sums.cpu(), expected.log_sums, atol=1e-4, rtol=0)


def test_many_of_the_likeliest_are_those_of_few(triton_device: torch.device) -> None:
    from raydata_llm.kernels.logprobs_triton import launch_logprob_records

    logits = logits_of(23, vocab=300).to(triton_device)
    own = torch.arange(ROWS).to(triton_device)
    many = logprob_records(logits, own, 300)
    few = launch_logprob_records(logits, own, 7)
    assert torch.equal(many.words[:, HEAD : HEAD + 14 : 2], few.words[:, HEAD::2])
    assert many.words[:, HEAD::2].sort(dim=1).values.tolist() == [list(range(300))] * ROWS


@pytest.mark.parametrize("padding", [0, 5, 64], ids="{} apart".format)
@pytest.mark.parametrize("vocab", [VOCAB, 4096, 16424, 31], ids=str)
def test_bitmask(vocab: int, padding: int, triton_dtype: torch.dtype, triton_device: torch.device) -> None:
    from raydata_llm.kernels.bitmask_triton import launch_apply_bitmask

    # Rows further apart than they are long: what is between them stays.
    whole = logits_of(22, vocab=vocab + padding).to(triton_dtype)
    # Fewer words than the vocabulary is long, where it has more than one.
    num_words = max(1, vocab // 32 - 1)
    words = torch.randint(-(2**31), 2**31, (4, num_words), generator=torch.Generator().manual_seed(1)).int()
    words[0, ::3] = -1
    words[0, 1::3] = 0
    words[1] = -1
    words[2] = 0
    rows = torch.tensor([4, 0, 2, 3])
    expected = whole.clone()
    for mask, row in zip(words.tolist(), rows.tolist(), strict=True):
        for token in range(vocab):
            if token >= 32 * num_words or not mask[token // 32] >> (token % 32) & 1:
                expected[row, token] = float("-inf")
    assert torch.equal(apply_bitmask_ref_(whole[:, :vocab].clone(), words, rows), expected[:, :vocab])
    found = whole.to(triton_device)
    launch_apply_bitmask(found[:, :vocab], words.to(triton_device), rows.to(triton_device))
    assert torch.equal(found.cpu(), expected)
