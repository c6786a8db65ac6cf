"""Log-probability and rank of one token a row on a GPU: a program goes through one row once.

The equations are in logprobs.py; imported only where the tensors are on a GPU. The sum is kept relative to the largest
logit so far, a lane each, and the lanes are merged at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.logprobs import TokenLogprobs

_BLOCK = 2048
# Below every logit; not -inf, whose difference with itself is no number.
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def _token_logprobs_kernel(
    logits_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * ROW_STRIDE
    chosen = tl.load(logits_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
    peak = tl.full([BLOCK], _LOWEST, tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=4):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, logit)
        weight = weight * tl.exp(peak - higher) + tl.exp(logit - higher)
        peak = higher
        above += (logit > chosen).to(tl.int32)
    highest = tl.max(peak, axis=0)
    log_sum = highest + tl.log(tl.sum(weight * tl.exp(peak - highest), axis=0))
    tl.store(logprobs_ptr + row, chosen - log_sum)
    tl.store(ranks_ptr + row, (tl.sum(above, axis=0) + 1).to(tl.int64))
    tl.store(log_sums_ptr + row, log_sum)


def launch_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> TokenLogprobs:
    """As `logprobs.token_logprobs`."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    assert token_ids.shape == (num_rows,), token_ids.shape
    found = TokenLogprobs(
        torch.empty(num_rows, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows, dtype=torch.int64, device=logits.device),
        torch.empty(num_rows, dtype=torch.float32, device=logits.device),
    )
    if num_rows:
        _token_logprobs_kernel[(num_rows,)](
            logits,
            token_ids,
            *found,
            ROW_STRIDE=logits.stride(0),
            VOCAB=vocab_size,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return found
