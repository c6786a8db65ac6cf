"""What the sampler makes of logits before it draws: transformers' logits processors, on random logits and prompts.

Where vLLM's meaning and transformers' differ, ours is vLLM's:
- presence and frequency penalties are not in transformers: here by their definition, over the output alone;
- `bad_words` look at the output alone, transformers' at the prompt too;
- `min_p` comes before `top_k` and `top_p`, transformers' generate puts it after them;
- logprobs are those before any of this, transformers' `scores` those after.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

from raydata_llm.engine import sampler as sampler_module
from raydata_llm.engine.bad_words import BadWords, BadWordsGuide
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampler import Sampler
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import Sequence
from raydata_llm.kernels.sampling import truncate

VOCAB = 503
PROMPT, OUTPUT = [3, 7, 7, 12, 400, 31], [12, 9, 9, 9, 250]
STOPS = (2, 77)
SLOT = 3
Processors = list[Any]
# Typed Any: its annotations ask for LongTensor.
HF: Any = transformers


class Penalties:
    """Presence and frequency penalties by their definition."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, len(PROMPT) :], minlength=VOCAB)
        return scores - self.frequency * counts - self.presence * (counts > 0)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed)) * 3


def sequence_of(params: SamplingParams, key: int = 0) -> Sequence:
    tokens = np.array(PROMPT + OUTPUT, dtype=np.int32)
    request = Request(
        request_id=str(key), prompt_token_ids=tokens[: len(PROMPT)], sampling_params=params, key=key * 7919 + 1
    )
    return Sequence(key, request, 0, tokens, len(PROMPT), 100, STOPS)


def bitmask_of(words: list[list[int]]) -> Bitmask:
    allowed = np.full(-(-VOCAB // 32), -1, dtype=np.int32)
    guide = BadWordsGuide(BadWords([tuple(word) for word in words]))
    for token_id in OUTPUT:
        guide.advance(token_id)
    guide.forbid(allowed)
    return Bitmask(np.array([0]), torch.from_numpy(allowed)[None])


def probabilities_of(
    params: SamplingParams, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, bitmask: Bitmask | None = None
) -> torch.Tensor:
    """[1, V] of the draw that the sampler makes for a row with these parameters."""
    sampler = Sampler(5, VOCAB, 2, torch.float32, torch.device("cpu"))
    sampler.admit([(SLOT, sequence_of(params))])
    seen: list[torch.Tensor] = []

    def sample(logits: torch.Tensor, temperature: Any, top_k: Any, top_p: Any, min_p: Any, *_: Any, **__: Any) -> Any:
        seen.append(truncate(logits.float() / temperature[:, None], top_k, top_p, min_p).softmax(-1))
        return logits.argmax(-1)

    monkeypatch.setattr(sampler_module, "sample", sample)
    batch = SimpleNamespace(sample_slots=np.array([SLOT]), sample_positions=np.array([len(PROMPT + OUTPUT)]))
    slots = torch.tensor([SLOT])
    sampler.sample(logits.clone(), cast(Any, batch), slots, torch.tensor([len(PROMPT + OUTPUT)]), bitmask)
    return seen[0]


def transformers_probabilities(processors: Processors, logits: torch.Tensor) -> torch.Tensor:
    made = HF.LogitsProcessorList(processors)
    scores: torch.Tensor = made(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    return scores.softmax(-1)


def biases(bias: dict[int, float]) -> Any:
    return HF.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})


ALLOWED = [1, 5, 9, 250, 400, 502]
CASES: dict[str, tuple[dict[str, Any], Processors]] = {
    "temperature": ({"temperature": 0.6}, [HF.TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 20}, [HF.TopKLogitsWarper(20)]),
    "top_k of more than there are": ({"top_k": 5000}, []),
    "top_p": ({"top_p": 0.8}, [HF.TopPLogitsWarper(0.8)]),
    "top_p of nearly nothing": ({"top_p": 1e-6}, [HF.TopPLogitsWarper(1e-6)]),
    "min_p": ({"min_p": 0.05}, [HF.MinPLogitsWarper(0.05)]),
    "repetition": ({"repetition_penalty": 1.7}, [HF.RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition that rewards": ({"repetition_penalty": 0.6}, [HF.RepetitionPenaltyLogitsProcessor(0.6)]),
    "presence and frequency": (
        {"presence_penalty": 1.2, "frequency_penalty": -0.7},
        [Penalties(1.2, -0.7)],
    ),
    "bias": ({"logit_bias": {3: 4.5, 77: -9.0, 2: 1.0}}, [biases({3: 4.5, 77: -9.0, 2: 1.0})]),
    "allowed tokens": (
        {"allowed_token_ids": ALLOWED},
        [HF.SuppressTokensLogitsProcessor([token for token in range(VOCAB) if token not in ALLOWED])],
    ),
    "min_tokens that are not there yet": (
        {"min_tokens": 6},
        [HF.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, list(STOPS))],
    ),
    "min_tokens that are": (
        {"min_tokens": 5},
        [HF.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, list(STOPS))],
    ),
    # In our order: biases and bans, penalties, temperature, min_p, top_k, top_p.
    "all": (
        {
            "logit_bias": {9: 3.0},
            "min_tokens": 6,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "temperature": 1.4,
            "min_p": 0.002,
            "top_k": 60,
            "top_p": 0.9,
        },
        [
            biases({9: 3.0}),
            HF.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, list(STOPS)),
            HF.RepetitionPenaltyLogitsProcessor(1.3),
            Penalties(0.4, 0.3),
            HF.TemperatureLogitsWarper(1.4),
            HF.MinPLogitsWarper(0.002),
            HF.TopKLogitsWarper(60),
            HF.TopPLogitsWarper(0.9),
        ],
    ),
}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found > 0, expected > 0), "the same tokens are left"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, processors = CASES[case]
    for seed in range(5):
        logits = logits_of(seed)
        found = probabilities_of(SamplingParams(**params), logits, monkeypatch)
        assert_same(found, transformers_probabilities(processors, logits))
        changes = not torch.allclose(found, logits.softmax(-1), atol=1e-6)
        assert changes == (case not in ("top_k of more than there are", "min_tokens that are"))


def logprobs_of(params: list[SamplingParams], logits: torch.Tensor, bitmask: Bitmask | None = None) -> torch.Tensor:
    """[M, V] that a sampler of `processed_logprobs` gives the rows that ask for all."""
    sampler = Sampler(len(params), VOCAB, 8, torch.float32, torch.device("cpu"), processed_logprobs=True)
    sampler.admit([(slot, sequence_of(one, key=slot)) for slot, one in enumerate(params)])
    slots = np.arange(len(params), dtype=np.int32)
    positions = np.full(len(params), len(PROMPT + OUTPUT))
    batch: Any = SimpleNamespace(sample_slots=slots, sample_positions=positions)
    there = torch.from_numpy(slots)
    tokens, found = sampler.sample(logits.clone(), batch, there, torch.from_numpy(positions), bitmask)
    assert found is not None
    # A drawn token is one that was left.
    own = found.values.records[:, 0].contiguous().view(torch.float32)
    assert torch.isfinite(own).all()
    by_token = torch.empty(len(own), VOCAB).scatter_(1, found.values.top_ids.long(), found.values.top_logprobs)
    assert torch.equal(by_token.gather(1, tokens[torch.from_numpy(found.rows)][:, None])[:, 0], own)
    return by_token


def test_processed_logprobs_are_those_of_transformers_probabilities() -> None:
    # Every other row asks for nothing, and rows of all kinds share the batch.
    params: list[SamplingParams] = []
    for case in CASES:
        params += [SamplingParams(**CASES[case][0], logprobs=-1), SamplingParams(temperature=0.0)]
    logits = logits_of(3, len(params))
    found = logprobs_of(params, logits)
    for row, case in enumerate(CASES):
        assert_same(found[row].exp(), transformers_probabilities(CASES[case][1], logits[2 * row : 2 * row + 1])[0])


def test_processed_logprobs_of_a_greedy_row_heed_no_temperature_and_no_cut() -> None:
    params = [
        SamplingParams(temperature=0.0, top_k=3, top_p=0.1, repetition_penalty=1.3, logprobs=-1),
        SamplingParams(temperature=0.5, top_k=3, logprobs=-1),
    ]
    logits = logits_of(4, 2)
    greedy, drawn = logprobs_of(params, logits)
    assert_same(greedy.exp(), transformers_probabilities([HF.RepetitionPenaltyLogitsProcessor(1.3)], logits[:1])[0])
    assert int(drawn.isfinite().sum()) == 3


def test_processed_logprobs_leave_out_what_a_mask_forbids() -> None:
    logits = logits_of(5)
    [found] = logprobs_of([SamplingParams(logprobs=-1)], logits, bitmask_of([[44], [250, 60]]))
    assert found.isinf().nonzero()[:, 0].tolist() == [44, 60]


def test_bad_words_mask_what_transformers_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [[44], [9, 250, 8], [250, 60], [9, 70], [9, 9, 250, 31]]
    logits = logits_of(1)
    # Only the output counts, so it stands for all that there is.
    alone = HF.NoBadWordsLogitsProcessor(words, eos_token_id=list(STOPS))(torch.tensor([OUTPUT]), logits.clone())
    found = probabilities_of(SamplingParams(), logits, monkeypatch, bitmask_of(words))
    assert (found == 0).nonzero()[:, 1].tolist() == [8, 31, 44, 60]
    assert_same(found, alone.softmax(-1))


@pytest.mark.parametrize("case", ["top_k", "top_p", "min_p", "repetition", "all"])
def test_draws_follow_transformers_probabilities(case: str) -> None:
    params, processors = CASES[case]
    rows = 20_000
    logits = logits_of(2)
    sampler = Sampler(rows, VOCAB, 1, torch.float32, torch.device("cpu"))
    # Penalised by hand: a pool of so many rows' counts would be gigabytes, and is tested above.
    penalised = [one for one in processors if not isinstance(one, HF.LogitsProcessor) or "Warper" not in str(type(one))]
    warped = {name: params[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in params}
    scores: torch.Tensor = HF.LogitsProcessorList(penalised)(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    sampler.admit([(slot, sequence_of(SamplingParams(**warped), slot)) for slot in range(rows)])
    slots = torch.arange(rows)
    batch = SimpleNamespace(sample_slots=slots.numpy(), sample_positions=np.full(rows, 11))
    drawn, _ = sampler.sample(scores.expand(rows, -1), cast(Any, batch), slots, torch.full((rows,), 11))
    expected = transformers_probabilities(processors, logits)[0].double() * rows
    counts = torch.bincount(drawn, minlength=VOCAB).double()
    assert not counts[expected == 0].any()
    # Rare tokens are taken together: the test wants five or more of a kind.
    often = expected >= 5
    observed = [*counts[often].tolist(), float(counts[~often].sum())]
    wanted = [*expected[often].tolist(), float(expected[~often].sum())]
    kinds = [place for place, value in enumerate(wanted) if value > 0]
    found, hoped = (np.array([values[place] for place in kinds]) for values in (observed, wanted))
    assert stats.chisquare(found, hoped * found.sum() / hoped.sum()).pvalue > 1e-3
