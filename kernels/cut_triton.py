"""Where to cut a list of logits, without sorting it: top-k and top-p as one threshold, for Triton kernels to call.

    kept(v) = logit[v] > pivot  or  (logit[v] == pivot and v < tie_end)

The semantics are `sampling.truncate_ref`'s; of tokens equal to the pivot the lowest stay. A list is in the order of its
tokens, stands in memory, and is either some candidates of a row or the whole row. The pivot is found by bisection over
the float's bits, nine ways at once: three readings of the list for 16-bit logits that are close together, ten for any
float32. Works on logits before the temperature, which changes no order.

Invariant: sums are taken in an order that depends on the list alone, so a row's cut never depends on its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Thresholds that are tried at once.
POINTS: tl.constexpr = tl.constexpr(8)


@triton.jit
def order_of(x: tl.tensor) -> tl.tensor:
    """An int64 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value_of(order: tl.tensor, ZERO_BITS: tl.constexpr) -> tl.tensor:
    """The float32 whose `order_of` is `order` but for the ZERO_BITS low ones, which are 0 in the float."""
    bits = (order << ZERO_BITS).to(tl.int32)
    bits = tl.where(bits < 0, (bits | ((1 << ZERO_BITS) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weigh(
    values_ptr: tl.tensor,
    count: tl.tensor,
    points: tl.tensor,
    floor: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    ZERO_BITS: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The weight, or else the number, of values at or above the floor and each of the points, [POINTS] float32."""
    thresholds = tl.maximum(value_of(points, ZERO_BITS), floor)
    above = tl.zeros([POINTS, BLOCK], tl.float32)
    for start in tl.range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + place, mask=place < count, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - peak) / temperature) if BY_WEIGHT else tl.full([BLOCK], 1.0, tl.float32)
        above += tl.where(x[None, :] >= thresholds[:, None], weight[None, :], 0.0)
    return tl.sum(above, axis=1)


@triton.jit
def _search(
    values_ptr: tl.tensor,
    count: tl.tensor,
    wanted: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    floor: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    ZERO_BITS: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The highest point in [low, high) with `wanted` from it on, or low; how much is above it; how much from it on."""
    index = tl.arange(0, POINTS)
    while high - low > 1:
        step = (high - low + POINTS) // (POINTS + 1)
        points = tl.minimum(low + step * (1 + index), high)
        enough = weigh(values_ptr, count, points, floor, peak, temperature, ZERO_BITS, BY_WEIGHT, BLOCK) >= wanted
        # What is at or above the last `high` is never enough, nor in question.
        enough &= points < high
        low, high = tl.max(tl.where(enough, points, low), axis=0), tl.min(tl.where(enough, high, points), axis=0)
    points = low + tl.where(index == 0, 1, 0)
    found = weigh(values_ptr, count, points, floor, peak, temperature, ZERO_BITS, BY_WEIGHT, BLOCK)
    return low, tl.min(found, axis=0), tl.max(found, axis=0)


@triton.jit
def _tie_end(
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    count: tl.tensor,
    pivot: tl.tensor,
    allowed: tl.tensor,
    VOCAB: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The end with `allowed` tokens before it that equal the pivot."""
    end, seen = VOCAB, 0
    for start in tl.range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        x = tl.load(values_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        token = place
        if LISTED:
            token = tl.load(tokens_ptr + place, mask=inside, other=VOCAB)
        tie = inside & (x == pivot)
        rank = seen + tl.cumsum(tie.to(tl.int32), axis=0)
        end = tl.minimum(end, tl.min(tl.where(tie & (rank == allowed), token + 1, VOCAB), axis=0))
        seen += tl.sum(tie.to(tl.int32), axis=0)
    return end


@triton.jit
def cut(
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    count: tl.tensor,
    floor: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    VOCAB: tl.constexpr,
    LISTED: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Pivot and tie_end of a list that holds all that may be kept; what is below the floor is not.

    Args:
        values_ptr, tokens_ptr, count: the list; its tokens are its places unless LISTED.
        peak: the largest value.
        total: without top_k, the weight that top_p is of; 0 if it is that of the list from the floor on.
    """
    low, top = order_of(floor) >> ZERO_BITS, (order_of(peak) >> ZERO_BITS) + 1
    allowed, ties = 1.0 * VOCAB, 0.0
    if (top_k > 0) & (top_k < VOCAB):
        low, number, number_from = _search(
            values_ptr, count, top_k, low, top, floor, peak, temperature, ZERO_BITS, False, BLOCK
        )
        ties = number_from - number
        allowed = tl.minimum(top_k - number, ties)
        if top_p < 1.0:
            points = tl.full([POINTS], 1, tl.int64) + low
            weight = tl.max(weigh(values_ptr, count, points, floor, peak, temperature, ZERO_BITS, True, BLOCK), axis=0)
            total = weight + tl.exp((value_of(low, ZERO_BITS) - peak) / temperature) * allowed
    if top_p < 1.0:
        if total <= 0.0:
            points = tl.full([POINTS], 0, tl.int64) + low
            total = tl.max(weigh(values_ptr, count, points, floor, peak, temperature, ZERO_BITS, True, BLOCK), axis=0)
        of_rank = low
        low, weight, _ = _search(
            values_ptr, count, top_p * total, low, top, floor, peak, temperature, ZERO_BITS, True, BLOCK
        )
        each = tl.exp((value_of(low, ZERO_BITS) - peak) / temperature)
        needed = tl.maximum(tl.ceil((top_p * total - weight) / each - 1e-4), 1.0)
        # Rounding must not bring back what top_k left out.
        allowed = tl.where(low == of_rank, tl.minimum(needed, allowed), needed)
        ties = 1.0 * VOCAB
    pivot = tl.maximum(value_of(low, ZERO_BITS), floor)
    tie_end = VOCAB
    if allowed + 0.5 < ties:
        tie_end = _tie_end(values_ptr, tokens_ptr, count, pivot, allowed.to(tl.int32), VOCAB, LISTED, BLOCK)
    return pivot, tie_end
