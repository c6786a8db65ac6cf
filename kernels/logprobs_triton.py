"""Log-probabilities of rows on a GPU: a program goes through one row once, then finds the likeliest one by one.

The equations and the record are in logprobs.py; imported only where the tensors are on a GPU. A lane sees every
BLOCK-th token and keeps the largest logit, its token, and a sum relative to the row's own token. The likeliest token
is the largest of the lanes' own; its lane then looks for its next one, which is a lane's few dozen tokens and no pass
over the row:

    tokens   0   1   2   3 | 4   5   6   7 | 8   9 ...        BLOCK = 4: lane 2 has 2, 6, 10 ...

What a lane has given away already is what is larger than its last one, or equal and of a lower token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import cdiv, next_power_of_2
from raydata_llm.kernels.logprobs import HEAD, Records

_BLOCK = 2048
_LOWEST: tl.constexpr = tl.constexpr(float("-inf"))
# exp of it, times a vocabulary, is a float32.
_FAR: tl.constexpr = tl.constexpr(60.0)
_NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["k"])
def _logprob_records_kernel(
    logits_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    words_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    k: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    PICKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE_TOKENS: tl.constexpr,
) -> None:
    record = tl.program_id(0).to(tl.int64)
    row = record
    if PICKED:
        row = tl.load(rows_ptr + record)
    logits_ptr += row * ROW_STRIDE
    words_ptr += record * (HEAD + 2 * k)
    chosen = tl.load(logits_ptr + tl.load(token_ids_ptr + record)).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    # Every lane holds a token from the start, its first, though all its logits be -inf; one beyond the end holds none.
    best = tl.load(logits_ptr + lane, mask=lane < VOCAB, other=_LOWEST).to(tl.float32)
    best_token = tl.where(lane < VOCAB, lane, _NO_TOKEN)
    weight = tl.exp(best - chosen)
    above = (best > chosen).to(tl.int32)
    for start in tl.range(BLOCK, VOCAB, BLOCK, num_stages=4):
        token = start + lane
        logit = tl.load(logits_ptr + token, mask=token < VOCAB, other=_LOWEST).to(tl.float32)
        weight += tl.exp(logit - chosen)
        best_token = tl.where(logit > best, token, best_token)
        best = tl.maximum(best, logit)
        above += (logit > chosen).to(tl.int32)
    highest = tl.max(best, axis=0)
    log_sum = chosen + tl.log(tl.sum(weight, axis=0))
    if not (highest - chosen <= _FAR):
        # Too far from the row's own token for a sum relative to that, which happens to a prompt's unlikely tokens.
        weight = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            token = start + lane
            logit = tl.load(logits_ptr + token, mask=token < VOCAB, other=_LOWEST).to(tl.float32)
            weight += tl.exp(logit - highest)
        log_sum = highest + tl.log(tl.sum(weight, axis=0))
    tl.store(log_sums_ptr + record, log_sum)
    tl.store(words_ptr, (chosen - log_sum).to(tl.int32, bitcast=True))
    tl.store(words_ptr + 1, tl.sum(above, axis=0) + 1)
    turn = tl.arange(0, LANE_TOKENS)
    for place in range(0, k):
        value = tl.max(best, axis=0)
        token = tl.min(tl.where(best == value, best_token, _NO_TOKEN), axis=0)
        # Where logits are no numbers nothing is the largest.
        token = tl.minimum(token, VOCAB - 1)
        tl.store(words_ptr + HEAD + 2 * place, token)
        tl.store(words_ptr + HEAD + 2 * place + 1, (value - log_sum).to(tl.int32, bitcast=True))
        owner = token % BLOCK
        others = owner + turn * BLOCK
        logit = tl.load(logits_ptr + others, mask=others < VOCAB, other=_LOWEST).to(tl.float32)
        is_left = (others < VOCAB) & ((logit < value) | ((logit == value) & (others > token)))
        left = tl.where(is_left, logit, _LOWEST)
        next_value = tl.max(left, axis=0)
        next_token = tl.min(tl.where(is_left & (left == next_value), others, _NO_TOKEN), axis=0)
        best = tl.where(lane == owner, next_value, best)
        best_token = tl.where(lane == owner, next_token, best_token)


def launch_logprob_records(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, rows: torch.Tensor | None = None
) -> Records:
    """As `logprobs.logprob_records`; the time grows with k."""
    vocab_size = logits.shape[1]
    num_records = len(logits) if rows is None else len(rows)
    assert logits.stride(1) == 1, logits.stride()
    assert token_ids.shape == (num_records,) and 0 <= k <= vocab_size, (token_ids.shape, num_records, k)
    found = Records(
        torch.empty((num_records, HEAD + 2 * k), dtype=torch.int32, device=logits.device),
        torch.empty(num_records, dtype=torch.float32, device=logits.device),
    )
    if num_records:
        _logprob_records_kernel[(num_records,)](
            logits,
            token_ids,
            rows,
            *found,
            k,
            ROW_STRIDE=logits.stride(0),
            VOCAB=vocab_size,
            PICKED=rows is not None,
            HEAD=HEAD,
            BLOCK=_BLOCK,
            LANE_TOKENS=next_power_of_2(cdiv(vocab_size, _BLOCK)),
            num_warps=8,
        )
    return found
