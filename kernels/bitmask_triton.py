"""Forbids tokens by bits on a GPU, in place: a program takes a stretch of one row's vocabulary, a word at a time.

A word whose tokens are all forbidden is written without reading its logits, one whose tokens are all allowed is left
alone, and only the logits of the others are read. So whether memory is touched is settled a word at a time, and loads
and stores are 16 bytes wide (where rows begin at multiples of that) and at most as many as the forbidden tokens need.

The equation and the reference are in bitmask.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.integers import cdiv

# Words of a program.
_BLOCK = 256


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
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + masked * NUM_WORDS + word, mask=word < NUM_WORDS, other=0)[:, None]
    bit = tl.arange(0, 32)[None, :]
    token = word[:, None] * 32 + bit
    place = logits_ptr + row * ROW_STRIDE + token
    some_forbidden, some_allowed = words != -1, words != 0
    forbidden = float("-inf")
    logits = tl.load(place, mask=some_forbidden & some_allowed & (token < VOCAB), other=forbidden)
    tl.store(place, tl.where((words >> bit) & 1 != 0, logits, forbidden), mask=some_forbidden & (token < VOCAB))


def launch_apply_bitmask(logits: torch.Tensor, words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As `bitmask.apply_bitmask_`."""
    vocab_size = logits.shape[1]
    assert logits.stride(1) == 1 and words.is_contiguous(), (logits.stride(), words.stride())
    assert words.dtype == torch.int32 and rows.dtype == torch.int64, (words.dtype, rows.dtype)
    if len(rows):
        _bitmask_kernel[(len(rows), cdiv(vocab_size, 32 * _BLOCK))](
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
