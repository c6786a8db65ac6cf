"""Where to cut a row's distribution, without sorting it: min-p, top-k and top-p as one threshold a row.

    kept(v) = logit[v] > pivot  or  (logit[v] == pivot and v < tie_end)

The semantics are `sampling.truncate_ref`'s; of tokens equal to the pivot the lowest stay. Imported only where the
tensors are on a GPU. Works on logits before the temperature, which changes no order.

Two launches, a program a row; rows that truncate nothing end at once:
1. the floor: a threshold under which nothing can be kept, and a list of the few candidates at or above it.
   The k-th largest of the maxima of strided stretches is no more than the k-th largest logit. For top_p alone, the
   highest of four thresholds with enough weight above it.
2. the cut: bisection over the float's bits, counting (top_k) or weighing (top_p) the candidates at or above; over the
   whole row where candidates are too many for the list (a flat distribution with top_p alone).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Room for a row's candidates.
_MAX_CANDIDATES = 4096
_BLOCK = 2048
# Low bits of a float32 that are 0 in what comes from a narrower dtype: as many steps fewer.
_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """An int64 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(order: tl.tensor, ZERO_BITS: tl.constexpr) -> tl.tensor:
    """The float32 whose `_order` is `order` but for the ZERO_BITS low ones, which are 0 in the float."""
    bits = (order << ZERO_BITS).to(tl.int32)
    bits = tl.where(bits < 0, (bits | ((1 << ZERO_BITS) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(x: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The k-th largest of a block's values, -inf if it has fewer."""
    order = _order(x)
    low, high = _order(tl.min(x, axis=0)), _order(tl.max(x, axis=0)) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((order >= middle).to(tl.int32), axis=0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return tl.where(k > x.numel, float("-inf"), _value(low, 0))


@triton.jit
def _floor_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    count_ptr: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    by_rank, by_weight = (top_k > 0) & (top_k < VOCAB), top_p < 1.0
    if (temperature <= 0.0) | ((not by_rank) & (not by_weight) & (min_p <= 0.0)):
        return
    logits_ptr += row * ROW_STRIDE
    lane = tl.arange(0, BLOCK)

    lane_peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=4):
        token = start + lane
        x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        lane_peak = tl.maximum(lane_peak, x)
    peak = tl.max(lane_peak, axis=0)
    floor = tl.where(min_p > 0.0, peak + tl.log(tl.maximum(min_p, 1e-30)) * temperature, float("-inf"))
    total = 0.0
    if by_rank:
        floor = tl.maximum(floor, _kth_largest(lane_peak, top_k))
    elif by_weight:
        depth = 4.0 * (1 + tl.arange(0, 4))
        above = tl.zeros([4, BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            token = start + lane
            x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
            scaled = (x - peak) / temperature
            weight = tl.where(x >= floor, tl.exp(scaled), 0.0)
            weights += weight
            above += tl.where(scaled[None, :] >= -depth[:, None], weight[None, :], 0.0)
        total = tl.sum(weights, axis=0)
        # A little more than top_p, for the sums' rounding.
        enough = tl.sum(above, axis=1) >= top_p * total * 1.0001
        depth = tl.min(tl.where(enough, depth, float("inf")), axis=0)
        floor = tl.maximum(floor, peak - (depth + 1e-4) * temperature)
    stats_ptr += row * 3
    tl.store(stats_ptr, peak)
    tl.store(stats_ptr + 1, floor)
    tl.store(stats_ptr + 2, total)

    count = 0
    if by_rank | by_weight:
        for start in tl.range(0, VOCAB, BLOCK, num_stages=4):
            token = start + lane
            x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf"))
            candidate = (x.to(tl.float32) >= floor) & (token < VOCAB)
            more = tl.sum(candidate.to(tl.int32), axis=0)
            if (more > 0) & (count <= ROOM):
                place = count + tl.cumsum(candidate.to(tl.int32), axis=0) - 1
                stored = candidate & (place < ROOM)
                tl.store(values_ptr + row * ROOM + place, x, mask=stored)
                tl.store(tokens_ptr + row * ROOM + place, token, mask=stored)
            count += more
    tl.store(count_ptr + row, count)


@triton.jit
def _tally(
    values_ptr: tl.tensor,
    count: tl.tensor,
    threshold: tl.tensor,
    floor: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """How many of the values are at or above both the threshold and the floor, and their weight."""
    threshold = tl.maximum(threshold, floor)
    number = tl.zeros([BLOCK], tl.int32)
    weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + place, mask=place < count, other=float("-inf")).to(tl.float32)
        chosen = (x >= threshold) & (place < count)
        number += chosen.to(tl.int32)
        weight += tl.where(chosen, tl.exp((x - peak) / temperature), 0.0)
    return tl.sum(number, axis=0), tl.sum(weight, axis=0)


@triton.jit
def _tie_end(
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    count: tl.tensor,
    listed: tl.tensor,
    pivot: tl.tensor,
    allowed: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The least end with `allowed` tokens before it that equal the pivot."""
    low, high = 0, VOCAB
    while high - low > 1:
        middle = (low + high) // 2
        number = tl.zeros([BLOCK], tl.int32)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < count
            x = tl.load(values_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
            token = place
            if listed:
                token = tl.load(tokens_ptr + place, mask=inside, other=VOCAB)
            number += (inside & (x == pivot) & (token < middle)).to(tl.int32)
        enough = tl.sum(number, axis=0) >= allowed
        low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    return high


@triton.jit
def _cut_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    count_ptr: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    pivot_ptr: tl.tensor,
    tie_end_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    ROOM: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    by_rank, by_weight = (top_k > 0) & (top_k < VOCAB), top_p < 1.0
    if (temperature <= 0.0) | ((not by_rank) & (not by_weight) & (min_p <= 0.0)):
        tl.store(pivot_ptr + row, float("-inf"))
        tl.store(tie_end_ptr + row, VOCAB)
        return
    stats_ptr += row * 3
    peak, floor, total = tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
    if (not by_rank) & (not by_weight):
        tl.store(pivot_ptr + row, floor)
        tl.store(tie_end_ptr + row, VOCAB)
        return
    count = tl.load(count_ptr + row)
    listed = count <= ROOM
    tokens_ptr += row * ROOM
    values_ptr += row * ROOM
    if not listed:
        values_ptr = logits_ptr + row * ROW_STRIDE
        count = VOCAB

    # Throughout, what is at or above `low` is enough, and what is at or above `high` is not.
    low, top = _order(floor) >> ZERO_BITS, (_order(peak) >> ZERO_BITS) + 1
    number, number_from, allowed = 0, 0, VOCAB
    if by_rank:
        high = top
        while high - low > 1:
            middle = low + (high - low) // 2
            number, _ = _tally(values_ptr, count, _value(middle, ZERO_BITS), floor, peak, temperature, BLOCK)
            low, high = tl.where(number >= top_k, middle, low), tl.where(number >= top_k, high, middle)
        number, weight = _tally(values_ptr, count, _value(low + 1, ZERO_BITS), floor, peak, temperature, BLOCK)
        number_from, weight_from = _tally(values_ptr, count, _value(low, ZERO_BITS), floor, peak, temperature, BLOCK)
        allowed = tl.minimum(top_k - number, number_from - number).to(tl.int32)
        total = weight + (weight_from - weight) * allowed / tl.maximum(number_from - number, 1)
    if by_weight:
        high = top
        while high - low > 1:
            middle = low + (high - low) // 2
            _, weight = _tally(values_ptr, count, _value(middle, ZERO_BITS), floor, peak, temperature, BLOCK)
            enough = weight >= top_p * total
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        number, weight = _tally(values_ptr, count, _value(low + 1, ZERO_BITS), floor, peak, temperature, BLOCK)
        number_from, weight_from = _tally(values_ptr, count, _value(low, ZERO_BITS), floor, peak, temperature, BLOCK)
        each = (weight_from - weight) / tl.maximum(number_from - number, 1)
        needed = tl.ceil((top_p * total - weight) / each - 1e-4)
        # No more than top_k left, whose weights `total` is the sum of.
        allowed = tl.minimum(tl.maximum(needed, 1.0), 1e9).to(tl.int32)
    pivot = tl.maximum(_value(low, ZERO_BITS), floor)
    tie_end = VOCAB
    if (allowed < VOCAB) & (number_from - number > allowed):
        tie_end = _tie_end(values_ptr, tokens_ptr, count, listed, pivot, allowed, VOCAB, BLOCK)
    tl.store(pivot_ptr + row, pivot)
    tl.store(tie_end_ptr + row, tie_end)


@triton.jit
def _mask_kernel(
    logits_ptr: tl.tensor,
    pivot_ptr: tl.tensor,
    tie_end_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    pivot, tie_end = tl.load(pivot_ptr + row), tl.load(tie_end_ptr + row)
    logit = tl.load(logits_ptr + row * ROW_STRIDE + token, mask=inside, other=0.0)
    wide = logit.to(tl.float32)
    kept = (wide > pivot) | ((wide == pivot) & (token < tie_end))
    tl.store(out_ptr + row * VOCAB + token, tl.where(kept, logit, float("-inf")), mask=inside)


def launch_cut(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row is cut: pivot [N] float32 and tie_end [N] int32, as the module says.

    Args:
        temperature: [N] float32; rows of temperature 0 are not cut.
        top_k, top_p, min_p: as in `sampling.truncate_ref`.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    device = logits.device
    pivot = torch.empty(num_rows, dtype=torch.float32, device=device)
    tie_end, count = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    stats = torch.empty((num_rows, 3), dtype=torch.float32, device=device)
    values = torch.empty((num_rows, _MAX_CANDIDATES), dtype=logits.dtype, device=device)
    tokens = torch.empty((num_rows, _MAX_CANDIDATES), dtype=torch.int32, device=device)
    sizes = {"ROW_STRIDE": logits.stride(0), "VOCAB": vocab_size, "ROOM": _MAX_CANDIDATES, "BLOCK": _BLOCK}
    if num_rows:
        parameters = (logits, temperature, top_k, top_p, min_p, stats, count, values, tokens)
        _floor_kernel[(num_rows,)](*parameters, **sizes, num_warps=8)
        _cut_kernel[(num_rows,)](*parameters, pivot, tie_end, **sizes, ZERO_BITS=_ZERO_BITS[logits.dtype], num_warps=8)
    return pivot, tie_end


def launch_truncate(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """As `sampling.truncate`."""
    num_rows, vocab_size = logits.shape
    ones = torch.ones(num_rows, dtype=torch.float32, device=logits.device)
    pivot, tie_end = launch_cut(logits, ones, top_k, top_p, min_p)
    out = torch.empty((num_rows, vocab_size), dtype=logits.dtype, device=logits.device)
    if num_rows:
        _mask_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits, pivot, tie_end, out, ROW_STRIDE=logits.stride(0), VOCAB=vocab_size, BLOCK=_BLOCK, num_warps=8
        )
    return out
