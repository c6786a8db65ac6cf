"""Log-probability and rank of one token a row, without a float32 copy of the logits.

    log_sum  = log sum_v exp l[v]
    logprob  = l[t] - log_sum
    rank     = 1 + |{v : l[v] > l[t]}|

dtype policy: float32 logits; on a GPU also the model's own dtype, read as float32.
Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLogprobs(NamedTuple):
    """Of one token a row, [N] each.

    Args:
        logprobs, log_sums: float32.
        ranks: int64, the likeliest has 1.
    """

    logprobs: torch.Tensor
    ranks: torch.Tensor
    log_sums: torch.Tensor


def token_logprobs_ref(logits: torch.Tensor, token_ids: torch.Tensor) -> TokenLogprobs:
    """As the module says.

    Args:
        logits: [N, V].
        token_ids: [N] int64.
    """
    wide = logits.float()
    log_sums = wide.logsumexp(dim=-1)
    chosen = wide.gather(1, token_ids[:, None])
    return TokenLogprobs(chosen[:, 0] - log_sums, (wide > chosen).sum(dim=-1) + 1, log_sums)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> TokenLogprobs:
    """As `token_logprobs_ref`; on a GPU in one pass over the logits."""
    if logits.is_cuda:
        from raydata_llm.kernels.logprobs_triton import launch_token_logprobs

        return launch_token_logprobs(logits, token_ids)
    return token_logprobs_ref(logits, token_ids)
