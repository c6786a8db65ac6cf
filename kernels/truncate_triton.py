"""Cuts each row's distribution on a GPU, without sorting it: min-p, top-k and top-p as one threshold a row.

    kept(v) = logit[v] > pivot  or  (logit[v] == pivot and v < tie_end)

The semantics are `sampling.truncate_ref`'s; of tokens equal to the pivot the lowest stay. Imported only where the
tensors are on a GPU. Works on logits before the temperature, which changes no order.

Passes over the logits that a row of each kind takes, its draw included:

| row | passes |
|---|---|
| greedy, or nothing cut | 1: the draw's |
| top_k up to some 1,000, with top_p or min_p or not | 1 and the stretches of some k candidates |
| min_p, or top_p alone, with few candidates (peaked) | as much |
| min_p with many | 2, and stretches until the list is full |
| top_p with many, thousands in top_k, many equal | as much, and a search of 6 for 16 bits, 12 for float32 |

With both top_k and top_p the search is made twice.

Launches: the two of candidates_triton.py; the search of whole rows, which ends at once for rows that a list of
candidates was enough for; then `draw_triton.launch_draw`, which does so for rows that are drawn already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.candidates_triton import PENDING, ZERO_BITS, launch_candidates
from raydata_llm.kernels.cut_triton import cut
from raydata_llm.kernels.draw_triton import Cut
from raydata_llm.kernels.integers import cdiv

# Of 2048, a program that searches takes most of an SM's registers.
_BLOCK = 1024


@triton.jit
def _search_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    pivot_ptr: tl.tensor,
    tie_end_ptr: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    VOCAB: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if tl.load(tie_end_ptr + row) != PENDING:
        return
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    stats_ptr += row * 3
    peak, floor, total = tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
    logits_ptr += row * ROW_STRIDE
    pivot, tie_end = cut(
        logits_ptr, None, VOCAB, floor, peak, total, temperature, top_k, top_p, VOCAB, False, ZERO_BITS, BLOCK
    )
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
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    keys: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Cut:
    """Where each row is cut, as the module says.

    Args:
        temperature: [N] float32; rows of temperature 0 are not cut.
        top_k, top_p, min_p: as in `sampling.truncate_ref`.
        keys, positions: as in `sampling.sample`; if given, rows of few candidates are drawn too.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    found, stats = launch_candidates(logits, temperature, top_k, top_p, min_p, keys, positions)
    if num_rows:
        _search_kernel[(num_rows,)](
            logits,
            temperature,
            top_k,
            top_p,
            stats,
            found.pivot,
            found.tie_end,
            ROW_STRIDE=logits.stride(0),
            VOCAB=vocab_size,
            ZERO_BITS=ZERO_BITS[logits.dtype],
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return found


def launch_truncate(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """As `sampling.truncate`."""
    num_rows, vocab_size = logits.shape
    ones = torch.ones(num_rows, dtype=torch.float32, device=logits.device)
    pivot, tie_end, _ = launch_cut(logits, ones, top_k, top_p, min_p)
    out = torch.empty((num_rows, vocab_size), dtype=logits.dtype, device=logits.device)
    if num_rows:
        _mask_kernel[(num_rows, cdiv(vocab_size, _BLOCK))](
            logits, pivot, tie_end, out, ROW_STRIDE=logits.stride(0), VOCAB=vocab_size, BLOCK=_BLOCK, num_warps=8
        )
    return out
