"""Attention over a paged KV cache whose rows come out the same, bit for bit, whatever the batch they run in.

The equation is paged_attention.py's. A token that was computed by decode is computed by prefill after a preemption, or
read from another row's blocks after a hit of the prefix cache, and a prompt is cut into chunks as the batch leaves
room. So there is one kernel for all of it, that of prefill, with one tile size a head size, dtype and kind of GPU: a
decode row is a chunk of one query. What it promises, and what it is paid for with:

- a query's keys are taken in tiles from key 0 (of a window: from a tile border) on, one after the other, by one
  program: keys are not split among programs where rows are few, and no prefix is attended to once for many rows;
- every tile of keys is masked alike. A loop of its own for the keys that all of a tile's queries see would begin its
  end elsewhere in another chunk; what a query does not see adds exact zeros to its sums and leaves its peak;
- a decode row fills only G rows of its tile. The decode kernel's smaller tiles use other instructions, whose sums no
  document says are the same.

dtype policy and shapes: paged_attention.py. What a launch reads of K and V is what is in the cache, never registers.
"""

from __future__ import annotations

import torch

from raydata_llm.kernels.paged_attention import paged_attention_ref, paged_decode_attention, paged_prefill_attention

invariant_attention_ref = paged_attention_ref


def invariant_attention(
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
) -> torch.Tensor:
    """Attention of a chunk of queries a row, of one query a row where `query_starts` is None; q [T, H, D].

    Off a GPU it is `paged_attention`'s, which promises no bits. A row of length 0 (padding) is not a number.
    """
    if q.is_cuda:
        from raydata_llm.kernels.invariant_attention_triton import launch_invariant_attention

        return launch_invariant_attention(
            q, k_cache, v_cache, block_table, context_lens, query_starts, scale, window, table_rows=table_rows, out=out
        )
    rows = (q, k_cache, v_cache, block_table, context_lens)
    if query_starts is None:
        return paged_decode_attention(*rows, scale, window, table_rows=table_rows, out=out)
    return paged_prefill_attention(*rows, query_starts, scale, window, table_rows=table_rows, out=out)
