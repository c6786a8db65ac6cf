"""Forbids tokens, by one bit a token:

    l[row, v] = -inf   where bit v % 32 of words[i, v // 32] is 0, row = rows[i]

Tokens that the words do not reach are forbidden too.

dtype policy: any floating dtype, in place.
Shapes: N rows of V logits, M masked rows, W = ceil(V / 32) words.
"""

from __future__ import annotations

import torch


def apply_bitmask_ref_(logits: torch.Tensor, words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As the module says, in place.

    Args:
        logits: [N, V].
        words: [M, W] int32.
        rows: [M] int64, each row once.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((words[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
    masked = torch.full((len(rows), logits.shape[1]), float("-inf"), dtype=logits.dtype, device=logits.device)
    reach = allowed.shape[1]
    masked[:, :reach] = torch.where(allowed, logits[rows, :reach], masked[:, :reach])
    logits[rows] = masked
    return logits


def apply_bitmask_(logits: torch.Tensor, words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As `apply_bitmask_ref_`; on a GPU without a copy."""
    if logits.is_cuda:
        from raydata_llm.kernels.bitmask_triton import launch_apply_bitmask

        return launch_apply_bitmask(logits, words, rows)
    return apply_bitmask_ref_(logits, words, rows)
