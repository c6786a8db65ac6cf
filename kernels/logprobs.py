"""Log-probabilities of a row's own token and of its k likeliest ones, without a float32 copy of the logits.

    log_sum    = log sum_v exp l[v]
    logprob(v) = l[v] - log_sum
    rank       = 1 + |{v : l[v] > l[own token]}|
    likeliest  = the k largest l[v], of equal ones the lowest v first

A row's answer is one record, so that one copy takes a step's answers to the host and a row's part of it is one slice:

    own token's logprob | its rank | token | its logprob | token | its logprob ...      a logprob as its float32's bits

dtype policy: float32 logits; on a GPU also the model's own dtype, read as float32.
Shapes: N rows of logits, V vocabulary, M rows asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from raydata_llm.kernels.invariant_topk import invariant_topk

# The likeliest tokens are found one after the other; of more than these, by torch over the whole row.
_MOST_AT_ONCE = 64
HEAD = 2


class Records(NamedTuple):
    """Of M rows.

    Args:
        words: [M, HEAD + 2 * k] int32, as the module says.
        log_sums: [M] float32.
    """

    words: torch.Tensor
    log_sums: torch.Tensor


def logprob_records_ref(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, rows: torch.Tensor | None = None
) -> Records:
    """As the module says.

    Args:
        logits: [N, V].
        token_ids: [M] int64; the rows' own tokens.
        k: At most V.
        rows: [M] int64; which rows of the logits, or None for all.
    """
    wide = (logits if rows is None else logits[rows]).float()
    log_sums = wide.logsumexp(dim=-1)
    chosen = wide.gather(1, token_ids[:, None])
    ranks = (wide > chosen).sum(dim=-1) + 1
    return _with_tops(_words(chosen[:, 0] - log_sums, ranks), log_sums, wide, k)


def logprob_records(logits: torch.Tensor, token_ids: torch.Tensor, k: int, rows: torch.Tensor | None = None) -> Records:
    """As `logprob_records_ref`; on a GPU in one pass over the logits if k is small."""
    if not logits.is_cuda:
        return logprob_records_ref(logits, token_ids, k, rows)
    from raydata_llm.kernels.logprobs_triton import launch_logprob_records

    if k <= _MOST_AT_ONCE:
        return launch_logprob_records(logits, token_ids, k, rows)
    head = launch_logprob_records(logits, token_ids, 0, rows)
    return _with_tops(head.words, head.log_sums, logits if rows is None else logits[rows], k)


def _words(logprobs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    return torch.stack([logprobs.view(torch.int32), ranks.int()], dim=1)


def _with_tops(head: torch.Tensor, log_sums: torch.Tensor, logits: torch.Tensor, k: int) -> Records:
    values, places = invariant_topk(logits, k)
    logprobs = (values.float() - log_sums[:, None]).view(torch.int32)
    tops = torch.stack([places.int(), logprobs], dim=2).flatten(1)
    return Records(torch.cat([head, tops], dim=1), log_sums)
