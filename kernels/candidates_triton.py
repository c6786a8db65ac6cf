"""The few tokens of a row that min-p, top-k or top-p may keep, in one pass over the logits; and the draw from them.

Two launches. Rows that cut nothing end at once.
1. peaks, the pass: the maximum of each stretch of CHUNK tokens, and, for top_p alone, the stretch's weight.
2. candidates, a program a row: a floor under which nothing can be kept; the tokens at or above it, from the stretches
   whose maximum is; then the exact cut, and the draw, of that list.

    top_k:        the k-th largest of the peaks is no more than the k-th largest logit
    min_p:        max l + log(min_p) * temperature
    top_p alone:  a guess: the highest peak t with R(t) * stretches <= below(t) * (1 - p) / 2, where R(t) is the share
                  of the weight that is in the below(t) stretches whose peak is less; proven by the list's own weight

A list too long for its room, or too light for top_p, is given up: the row is marked for a search of the whole of it.

Invariant: what a list gives is what the whole row would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.cut_triton import POINTS, cut, order_of, value_of, weigh
from raydata_llm.kernels.draw_triton import Cut, gumbel, row_seed
from raydata_llm.kernels.integers import cdiv, next_power_of_2

# Room for a row's candidates. A top_k of 1000 gives some 1,400 of them.
_ROOM = 2048
# Stretches are the shortest, of one cache sector or more, that make no more than these.
_MAX_CHUNKS = 2560
# Candidates, and tokens of their stretches, that a program takes at a time; tokens of a program of the pass.
_BLOCK = 256
_LIST_BLOCK = 1024
_PASS_BLOCK = 8192
# Low bits of a float32 that are 0 in what comes from a narrower dtype: as many steps fewer.
ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
# In place of a tie_end and a token: to be found in the whole row.
PENDING: tl.constexpr = tl.constexpr(-1)
_NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _cuts(
    temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, VOCAB: tl.constexpr
) -> tl.tensor:
    """Whether a row is random and may lose a token."""
    return (temperature > 0.0) & (((top_k > 0) & (top_k < VOCAB)) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def _peaks_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    if not _cuts(temperature, top_k, top_p, min_p, VOCAB):
        return
    chunk = tl.program_id(1) * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = tl.load(logits_ptr + row * ROW_STRIDE + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, axis=1)
    tl.store(peaks_ptr + row * NUM_CHUNKS + chunk, peak, mask=chunk < NUM_CHUNKS)
    if (top_p < 1.0) & (min_p <= 0.0) & ((top_k <= 0) | (top_k >= VOCAB)):
        depth = (tl.maximum(peak, _LOWEST)[:, None] - x) / -temperature
        tl.store(weights_ptr + row * NUM_CHUNKS + chunk, tl.sum(tl.exp(depth), axis=1), mask=chunk < NUM_CHUNKS)


@triton.jit
def _floor_of_peaks(
    peaks: tl.tensor,
    inside: tl.tensor,
    weights: tl.tensor,
    top_k: tl.tensor,
    spare: tl.tensor,
    NUM_CHUNKS: tl.constexpr,
) -> tl.tensor:
    """Nearly the highest floor with top_k peaks from it on, and below it, by the guess, no more weight than `spare`."""
    low = order_of(tl.min(tl.where(inside, peaks, float("inf")), axis=0))
    high = order_of(tl.max(peaks, axis=0)) + 1
    above_low, above_high = NUM_CHUNKS, 0
    # A few stretches too many cost less than the last steps.
    while (high - low > 1) & (above_low > above_high + above_high // 4 + 4):
        middle = low + (high - low) // 2
        above = peaks >= value_of(middle, 0)
        number = tl.sum(above.to(tl.int32), axis=0)
        rest = tl.sum(tl.where(above, 0.0, weights), axis=0)
        enough = (number >= top_k) & (rest * NUM_CHUNKS <= spare * (NUM_CHUNKS - number))
        low, above_low = tl.where(enough, middle, low), tl.where(enough, number, above_low)
        high, above_high = tl.where(enough, high, middle), tl.where(enough, above_high, number)
    return tl.where(top_k > NUM_CHUNKS, _LOWEST, value_of(low, 0))


@triton.jit
def _list_candidates(
    logits_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    num_chunks: tl.tensor,
    floor: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Write what is at or above the floor, in order of the tokens; how many, or more than ROOM if it does not fit."""
    lane = tl.arange(0, BLOCK)
    start, count = 0, 0
    while (start < num_chunks) & (count <= ROOM):
        which = start + lane // CHUNK
        chunk = tl.load(chunks_ptr + which, mask=which < num_chunks, other=0)
        token = chunk * CHUNK + lane % CHUNK
        inside = (which < num_chunks) & (token < VOCAB)
        x = tl.load(logits_ptr + token, mask=inside, other=float("-inf"))
        found = x.to(tl.float32) >= floor
        place = count + tl.cumsum(found.to(tl.int32), axis=0) - 1
        tl.store(values_ptr + place, x, mask=found & (place < ROOM))
        tl.store(tokens_ptr + place, token, mask=found & (place < ROOM))
        count += tl.sum(found.to(tl.int32), axis=0)
        start += BLOCK // CHUNK
    return count


@triton.jit
def _draw(
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    count: tl.tensor,
    pivot: tl.tensor,
    tie_end: tl.tensor,
    temperature: tl.tensor,
    seed: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The kept token of the list with the highest score; of equals the lowest."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK], _NO_TOKEN, tl.int32)
    for start in tl.range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + place, mask=place < count, other=float("-inf")).to(tl.float32)
        token = tl.load(tokens_ptr + place, mask=place < count, other=0)
        kept = (x > pivot) | ((x == pivot) & (token < tie_end))
        score = tl.where(kept, x, float("-inf")) / temperature + gumbel(seed, token)
        better = score > best
        best, best_token = tl.where(better, score, best), tl.where(better, token, best_token)
    return tl.min(tl.where(best == tl.max(best, axis=0), best_token, _NO_TOKEN), axis=0)


@triton.jit
def _candidates_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    pivot_ptr: tl.tensor,
    tie_end_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    ROOM: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    DRAW: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    tl.store(pivot_ptr + row, float("-inf"))
    tl.store(tie_end_ptr + row, VOCAB)
    tl.store(drawn_ptr + row, PENDING)
    if not _cuts(temperature, top_k, top_p, min_p, VOCAB):
        return
    by_rank, by_weight = (top_k > 0) & (top_k < VOCAB), top_p < 1.0
    guessed = by_weight & (not by_rank) & (min_p <= 0.0)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    inside = chunk < NUM_CHUNKS
    peaks = tl.load(peaks_ptr + row * NUM_CHUNKS + chunk, mask=inside, other=float("-inf")).to(tl.float32)
    peak = tl.max(peaks, axis=0)
    if peak == float("-inf"):
        return

    # Nothing that is -inf is a candidate.
    floor = tl.where(min_p > 0.0, peak + tl.log(tl.maximum(min_p, 1e-30)) * temperature, _LOWEST)
    floor, total = tl.maximum(floor, _LOWEST), 0.0
    if by_rank | guessed:
        weights = tl.zeros([BLOCK_CHUNKS], tl.float32)
        if guessed:
            weights = tl.load(weights_ptr + row * NUM_CHUNKS + chunk, mask=inside, other=0.0)
            weights *= tl.exp((peaks - peak) / temperature)
            total = tl.sum(weights, axis=0)
        spare = (1.0 - top_p) * total * 0.5
        highest = _floor_of_peaks(peaks, inside, weights, tl.where(by_rank, top_k, 0), spare, NUM_CHUNKS)
        floor = tl.maximum(floor, highest)

    chosen = peaks >= floor
    chunks_ptr += row * NUM_CHUNKS
    values_ptr += row * ROOM
    tokens_ptr += row * ROOM
    tl.store(chunks_ptr + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, chunk, mask=chosen)
    # What some threads of a program write to memory, others read from here on.
    tl.debug_barrier()
    num_chunks = tl.sum(chosen.to(tl.int32), axis=0)
    logits_ptr += row * ROW_STRIDE
    count = _list_candidates(
        logits_ptr, chunks_ptr, num_chunks, floor, values_ptr, tokens_ptr, VOCAB, CHUNK, ROOM, LIST_BLOCK
    )
    tl.debug_barrier()
    listed = count <= ROOM
    if listed & guessed:
        points = tl.full([POINTS], 0, tl.int64) + (order_of(floor) >> ZERO_BITS)
        found = weigh(values_ptr, count, points, floor, peak, temperature, ZERO_BITS, True, BLOCK)
        # A little more than top_p, for the sums' rounding.
        listed = tl.max(found, axis=0) >= top_p * total * 1.00001
    if not listed:
        if by_rank | by_weight:
            stats_ptr += row * 3
            tl.store(stats_ptr, peak)
            tl.store(stats_ptr + 1, tl.where(guessed, _LOWEST, floor))
            tl.store(stats_ptr + 2, total)
            tl.store(tie_end_ptr + row, PENDING)
        else:
            tl.store(pivot_ptr + row, floor)
        return
    pivot, tie_end = floor, VOCAB
    if by_rank | by_weight:
        pivot, tie_end = cut(
            values_ptr, tokens_ptr, count, floor, peak, total, temperature, top_k, top_p, VOCAB, True, ZERO_BITS, BLOCK
        )
    tl.store(pivot_ptr + row, pivot)
    tl.store(tie_end_ptr + row, tie_end)
    if DRAW:
        seed = row_seed(tl.load(keys_ptr + row), tl.load(positions_ptr + row))
        drawn = _draw(values_ptr, tokens_ptr, count, pivot, tie_end, temperature, seed, BLOCK)
        tl.store(drawn_ptr + row, drawn.to(tl.int64))


def launch_candidates(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    keys: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[Cut, torch.Tensor]:
    """Cut the rows that few candidates are enough for, and with keys draw from them.

    Returns:
        The cut, its tie_end PENDING where the whole row must be searched; and what such rows need, [N, 3] float32:
        peak, floor and, for top_p alone, the weight of all.
    """
    num_rows, vocab_size = logits.shape
    chunk = max(16, next_power_of_2(cdiv(vocab_size, _MAX_CHUNKS)))
    num_chunks = cdiv(vocab_size, chunk)
    assert chunk <= _LIST_BLOCK, vocab_size

    def empty(dtype: torch.dtype, *width: int) -> torch.Tensor:
        return torch.empty((num_rows, *width), dtype=dtype, device=logits.device)

    found, stats = Cut(empty(torch.float32), empty(torch.int32), empty(torch.int64)), empty(torch.float32, 3)
    if not num_rows:
        return found, stats
    peaks, weights = empty(logits.dtype, num_chunks), empty(torch.float32, num_chunks)
    candidates = empty(torch.int32, num_chunks), empty(logits.dtype, _ROOM), empty(torch.int32, _ROOM)
    sizes = {"ROW_STRIDE": logits.stride(0), "VOCAB": vocab_size, "CHUNK": chunk, "NUM_CHUNKS": num_chunks}
    parameters = (temperature, top_k, top_p, min_p)
    block_chunks = _PASS_BLOCK // chunk
    _peaks_kernel[(num_rows, cdiv(num_chunks, block_chunks))](
        logits, *parameters, peaks, weights, **sizes, BLOCK_CHUNKS=block_chunks, num_warps=8
    )
    _candidates_kernel[(num_rows,)](
        logits,
        *parameters,
        *(keys, positions),
        *(peaks, weights),
        *candidates,
        stats,
        *found,
        **sizes,
        BLOCK_CHUNKS=next_power_of_2(num_chunks),
        ROOM=_ROOM,
        ZERO_BITS=ZERO_BITS[logits.dtype],
        DRAW=keys is not None,
        BLOCK=_BLOCK,
        LIST_BLOCK=_LIST_BLOCK,
        num_warps=4,
    )
    return found, stats
