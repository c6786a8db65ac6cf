"""Attention in tiles that the batch does not choose, on a GPU: the prefill kernel with its own row of the tuning table.

What is promised, and why by this kernel, is in invariant_attention.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

from functools import cache

import torch

from raydata_llm.kernels import tuning
from raydata_llm.kernels.integers import next_power_of_2
from raydata_llm.kernels.invariant_linear_triton import aligned
from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention


def launch_invariant_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor | None,
    scale: float,
    window: int | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: tuning.Tile | None = None,
) -> torch.Tensor:
    """As `invariant_attention.invariant_attention`.

    Args:
        tile: overrides the choice for the GPU.
    """
    tile = tile or tuning.tuning_of(q.device).invariant_tile(next_power_of_2(q.shape[2]), q.dtype)
    assert not tile.split_mask, "keys that all queries see would be taken by another loop"
    if query_starts is None:
        query_starts = _one_each(next_power_of_2(len(q)), q.device)[: len(q) + 1]
    return launch_paged_prefill_attention(
        aligned(q),
        k_cache,
        v_cache,
        block_table,
        context_lens,
        query_starts,
        scale,
        window,
        table_rows=table_rows,
        out=out,
        tile=tile,
    )


@cache
def _one_each(num_rows: int, device: torch.device) -> torch.Tensor:
    """Where rows of one query begin; made once, and so not while a graph is captured, which a launch comes before."""
    return torch.arange(num_rows + 1, dtype=torch.int32, device=device)
