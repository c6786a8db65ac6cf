"""Penalties on a GPU, in place: a program takes a stretch of one row's vocabulary.

The equation and the reference are in sampling.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import cdiv

_BLOCK = 2048


@triton.jit
def _penalise_kernel(
    logits_ptr: tl.tensor,
    in_prompt_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    pool_rows_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    POOLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    pool_row = row
    if POOLED:
        pool_row = tl.load(pool_rows_ptr + row).to(tl.int64)
    if pool_row < 0:
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    count = tl.load(counts_ptr + pool_row * VOCAB + token, mask=inside, other=0).to(tl.float32)
    in_prompt = tl.load(in_prompt_ptr + pool_row * VOCAB + token, mask=inside, other=0) != 0
    repetition = tl.load(repetition_ptr + pool_row)
    place = logits_ptr + row * ROW_STRIDE + token
    old = tl.load(place, mask=inside, other=0.0)
    logit = old.to(tl.float32)
    factor = tl.where(logit > 0.0, 1.0 / repetition, repetition)
    logit *= tl.where(in_prompt | (count > 0.0), factor, 1.0)
    logit -= tl.load(frequency_ptr + pool_row) * count
    logit -= tl.where(count > 0.0, tl.load(presence_ptr + pool_row), 0.0)
    tl.store(place, logit.to(old.dtype), mask=inside)


def launch_penalise(
    logits: torch.Tensor,
    in_prompt: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
    pool_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `sampling.penalise_`."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and in_prompt.is_contiguous() and output_counts.is_contiguous()
    assert in_prompt.shape == output_counts.shape and in_prompt.shape[1] == vocab_size, in_prompt.shape
    if num_rows:
        _penalise_kernel[(num_rows, cdiv(vocab_size, _BLOCK))](
            logits,
            in_prompt,
            output_counts,
            presence.contiguous(),
            frequency.contiguous(),
            repetition.contiguous(),
            pool_rows,
            ROW_STRIDE=logits.stride(0),
            VOCAB=vocab_size,
            POOLED=pool_rows is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return logits
