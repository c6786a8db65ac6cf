"""Forbids tokens by bits on a GPU, in place: a program takes a stretch of one row's vocabulary, and only writes.

The equation and the reference are in bitmask.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _bitmask_kernel(
    logits_ptr: tl.tensor,
    words_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    masked = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + masked)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = token // 32
    bits = tl.load(words_ptr + masked * NUM_WORDS + word, mask=word < NUM_WORDS, other=0)
    forbidden = ((bits >> (token % 32)) & 1) == 0
    place = logits_ptr + row * ROW_STRIDE + token
    tl.store(place, tl.full([BLOCK], float("-inf"), logits_ptr.dtype.element_ty), mask=forbidden & (token < VOCAB))


def launch_apply_bitmask(logits: torch.Tensor, words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As `bitmask.apply_bitmask_`."""
    vocab_size = logits.shape[1]
    assert logits.stride(1) == 1 and words.is_contiguous(), (logits.stride(), words.stride())
    assert words.dtype == torch.int32 and rows.dtype == torch.int64, (words.dtype, rows.dtype)
    if len(rows):
        _bitmask_kernel[(len(rows), triton.cdiv(vocab_size, _BLOCK))](
            logits,
            words,
            rows,
            ROW_STRIDE=logits.stride(0),
            VOCAB=vocab_size,
            NUM_WORDS=words.shape[1],
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return logits
