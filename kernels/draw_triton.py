"""Tokens from logits on a GPU: argmax, or argmax with keyed noise, in one pass and without a copy of the logits.

The equations and the noise's definition are in sampling.py; imported only where the tensors are on a GPU. Rows of all
kinds go in one launch: what a row is, greedy or random, truncated or not, is read on the device. A row's vocabulary is
split among programs where rows are too few to fill the chip; of equal scores the lowest token wins, so the split does
not show.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from raydata_llm.kernels import tuning

_BLOCK = 2048
_MAX_SPLITS = 32
# Programs of eight warps that keep an SM busy.
_PROGRAMS_PER_SM = 8
_NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)


class Cut(NamedTuple):
    """What cutting a step's rows leaves to draw from, [N] each.

    Args:
        pivot, tie_end: float32 and int32: kept is what is above the pivot, or equals it and is before tie_end.
        drawn: int64: the token of a row that is drawn already, else less than 0. The draw writes the others here.
    """

    pivot: torch.Tensor
    tie_end: torch.Tensor
    drawn: torch.Tensor


@triton.jit
def row_seed(key: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`sampling.row_seeds`."""
    x = key.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel(seed: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`sampling.gumbel_noise` of some tokens: the same 32 bits, then the same function of them."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x = token.to(tl.uint32) * 0x9E3779B9 + low
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = ((x ^ (x >> 11)) + high) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = x ^ (x >> 14)
    uniform = ((x & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2^-24
    # -log1p(-u): near 0, where large noise comes from, by its series (the next term is below 1e-8 of it).
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333334 + uniform * (0.25 + uniform * 0.2))))
    exponential = tl.where(uniform < 0.03, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["num_splits", "first_token"])
def _draw_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    pivot_ptr: tl.tensor,
    tie_end_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    part_ptr: tl.tensor,
    num_splits: tl.tensor,
    first_token: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    RANDOM: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    drawn = tl.load(drawn_ptr + row) if TRUNCATED else -1
    if drawn >= 0:
        return
    stretch = tl.cdiv(tl.cdiv(VOCAB, BLOCK), num_splits) * BLOCK
    begin = tl.program_id(1) * stretch
    temperature, seed, pivot, tie_end = 0.0, tl.full([], 0, tl.uint64), float("-inf"), VOCAB
    if RANDOM:
        temperature = tl.load(temperature_ptr + row)
        seed = row_seed(tl.load(keys_ptr + row), tl.load(positions_ptr + row))
    if TRUNCATED:
        pivot, tie_end = tl.load(pivot_ptr + row), tl.load(tie_end_ptr + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(begin, tl.minimum(begin + stretch, VOCAB), BLOCK, num_stages=4):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(logits_ptr + row * ROW_STRIDE + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        if temperature > 0.0:
            keeps = True
            if TRUNCATED:
                kept = (score > pivot) | ((score == pivot) & (token < tie_end))
                score = tl.where(kept, score, float("-inf"))
                # Noise costs more than the logits' way here: none where a truncated row keeps nothing.
                keeps = tl.max(score, axis=0) > float("-inf")
            if keeps:
                score = score / temperature + gumbel(seed, token + first_token)
        better = score > best
        best, best_token = tl.where(better, score, best), tl.where(better, token, best_token)
    score = tl.max(best, axis=0)
    # The lowest of equals; where nothing is better than -inf, token 0.
    chosen = tl.min(tl.where(best == score, best_token, _NO_TOKEN), axis=0)
    if SPLIT:
        tl.store(part_ptr + row * num_splits + tl.program_id(1), score)
        tl.store(tokens_ptr + row * num_splits + tl.program_id(1), chosen.to(tl.int64))
    else:
        tl.store(tokens_ptr + row, chosen.to(tl.int64))


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    part_ptr: tl.tensor,
    part_tokens_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    num_splits: tl.tensor,
    TRUNCATED: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    drawn = tl.load(tokens_ptr + row) if TRUNCATED else -1
    if drawn >= 0:
        return
    split = tl.arange(0, BLOCK_SPLITS)
    inside = split < num_splits
    score = tl.load(part_ptr + row * num_splits + split, mask=inside, other=float("-inf"))
    token = tl.load(part_tokens_ptr + row * num_splits + split, mask=inside, other=_NO_TOKEN)
    tl.store(tokens_ptr + row, tl.min(tl.where(score == tl.max(score, axis=0), token, _NO_TOKEN), axis=0))


def launch_greedy(logits: torch.Tensor) -> torch.Tensor:
    """As `sampling.greedy`."""
    return _launch(logits)


def launch_draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    cut: Cut | None = None,
    first_token: int = 0,
) -> torch.Tensor:
    """A token a row: the likeliest where the temperature is 0, else a draw.

    Args:
        cut: of `truncate_triton.launch_cut`; rows that it drew are not drawn again.
        first_token: The first column's, as in `sampling.sample`.
    """
    return _launch(logits, temperature, keys, positions, cut, first_token)


def _launch(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cut: Cut | None = None,
    first_token: int = 0,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    pivot, tie_end, drawn = cut or (None, None, None)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if drawn is None else drawn
    if not num_rows:
        return tokens
    num_splits = min(_MAX_SPLITS, max(1, _PROGRAMS_PER_SM * tuning.num_sms(logits.device) // num_rows))
    parts, part_tokens = None, tokens
    if num_splits > 1:
        parts = torch.empty((num_rows, num_splits), dtype=torch.float32, device=logits.device)
        part_tokens = torch.empty((num_rows, num_splits), dtype=torch.int64, device=logits.device)
    _draw_kernel[(num_rows, num_splits)](
        logits,
        temperature,
        keys,
        positions,
        pivot,
        tie_end,
        drawn,
        part_tokens,
        parts,
        num_splits,
        first_token,
        ROW_STRIDE=logits.stride(0),
        VOCAB=vocab_size,
        RANDOM=temperature is not None,
        TRUNCATED=cut is not None,
        SPLIT=num_splits > 1,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    if num_splits > 1:
        _merge_kernel[(num_rows,)](
            parts, part_tokens, tokens, num_splits, TRUNCATED=cut is not None, BLOCK_SPLITS=_MAX_SPLITS, num_warps=1
        )
    return tokens
