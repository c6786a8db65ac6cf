"""Attention over a paged KV cache: one query a row (decode), or a chunk of queries a row (prefill).

    out[q] = softmax(scale * Q[q] K^T) V      over the keys j with  pos(q) - window < j <= pos(q)

where row r's keys 0..context_lens[r]-1 lie in the blocks of block_table[r], and its last query has position
context_lens[r] - 1. Queries and keys share heads in groups of G = H / K.

Row r's blocks stand in row r of the block table, or in row table_rows[r] of a table of all slots.

dtype policy: scores and softmax in float32.
Shapes: R rows, T queries, H heads, K KV heads, D head_dim; q [T, H, D], cache [blocks, K, block_size, D],
block_table [R or slots, columns] int32, table_rows [R] integer, context_lens [R] int32, query_starts [R + 1] int32;
out [T, H, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class SharedPrefixes:
    """Groups of neighbouring rows whose first keys lie in the same blocks, to be attended to once a group.

    Args:
        starts: [G + 1] int32; group g are the rows starts[g] to starts[g + 1] - 1.
        lens: [G] int32; keys that a group shares, whole blocks; 0 in an unused group, which has no rows.
        table_rows: [G] integer; the block table's row that has them.
        row_lens: [R] int32; the same by row, 0 for rows in no group.
    """

    starts: torch.Tensor
    lens: torch.Tensor
    table_rows: torch.Tensor
    row_lens: torch.Tensor


def paged_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    table_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation, a row and a head at a time."""
    out = torch.empty_like(q)
    block_table = block_table if table_rows is None else block_table[table_rows]
    group = q.shape[1] // k_cache.shape[1]
    for row in range(len(context_lens)):
        start, end = int(query_starts[row]), int(query_starts[row + 1])
        length = int(context_lens[row])
        positions = torch.arange(length - (end - start), length, device=q.device)[:, None]
        keys = torch.arange(length, device=q.device)[None, :]
        visible = keys <= positions
        if window is not None:
            visible &= positions - keys < window
        for head in range(q.shape[1]):
            k, v = (_row_kv(cache, block_table[row], length, head // group) for cache in (k_cache, v_cache))
            scores = q[start:end, head].float() @ k.float().T * scale
            weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
            out[start:end, head] = (weights @ v.float()).to(q.dtype)
    return out


def _row_kv(cache: torch.Tensor, blocks: torch.Tensor, length: int, kv_head: int) -> torch.Tensor:
    return cache[blocks.long(), kv_head].reshape(-1, cache.shape[3])[:length]


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    shared: SharedPrefixes | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query a row: q [R, H, D]; written to `out` if given.

    On a CPU rows of like length are gathered together, so that a batch of uneven lengths pays little for padding; what
    rows share is read from its group's blocks, but for each row anew.
    """
    if q.is_cuda:
        from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

        return launch_paged_decode_attention(
            q, k_cache, v_cache, block_table, context_lens, scale, window, table_rows=table_rows, shared=shared, out=out
        )
    block_table = _rows_table(block_table, context_lens, k_cache.shape[2], table_rows)
    if shared is not None:
        block_table = _with_shared_blocks(block_table, shared, k_cache.shape[2])
    out = torch.empty_like(q) if out is None else out
    order = torch.argsort(context_lens)
    for rows in order.split(_rows_at_once(len(context_lens))):
        lens = context_lens[rows]
        columns = -(-int(lens.max()) // k_cache.shape[2])
        table = block_table[rows, :columns]
        out[rows] = _decode_rows(q[rows], k_cache, v_cache, table, lens, scale, window)
    return out


def _rows_table(
    block_table: torch.Tensor, context_lens: torch.Tensor, block_size: int, table_rows: torch.Tensor | None
) -> torch.Tensor:
    """The rows' own block table, no wider than the longest row."""
    columns = -(-int(context_lens.max()) // block_size)
    return block_table[:, :columns] if table_rows is None else block_table[table_rows, :columns]


def _with_shared_blocks(block_table: torch.Tensor, shared: SharedPrefixes, block_size: int) -> torch.Tensor:
    """Each grouped row with its group's blocks in front."""
    table, starts = block_table.clone(), shared.starts.tolist()
    for group, length in enumerate(shared.lens.tolist()):
        rows = slice(starts[group], starts[group + 1])
        # The group's own row of the table is one of its members'.
        table[rows, : length // block_size] = block_table[rows, : length // block_size][:1]
    return table


def _rows_at_once(num_rows: int) -> int:
    # Measured on 2 cores, 64 rows of 100..1100 tokens: one gather of all 1.9x the time of groups of 16; smaller
    # groups gain nothing more.
    return max(1, min(num_rows, 16))


def _decode_rows(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Rows in order of their length, the last one filling all columns."""
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    keys = torch.arange(block_table.shape[1] * k_cache.shape[2], device=q.device)
    visible = keys < context_lens[:, None]
    if window is not None:
        visible &= keys >= context_lens[:, None] - window
    # The heads of a group stand where a sequence of queries would: K and V are read once for all of them.
    grouped = q.view(rows, kv_heads, heads // kv_heads, head_dim)
    block_size = k_cache.shape[2]
    used = (context_lens - 1) // block_size
    # Unused columns read a full block instead, the first of the longest row: numbers, which the mask takes out.
    unused = torch.arange(block_table.shape[1], device=q.device) > used[:, None]
    block_table = torch.where(unused, block_table[-1, 0], block_table)
    k, v = gather_kv(k_cache, block_table), gather_kv(v_cache, block_table)
    for gathered in (k, v):
        _clear_stale_(gathered, context_lens, used, block_size)
    mask = visible[:, None, None, :].expand(-1, -1, heads // kv_heads, -1)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def _clear_stale_(
    gathered: torch.Tensor, context_lens: torch.Tensor, last_block: torch.Tensor, block_size: int
) -> None:
    """Zero what lies past each row's end in its last block: what the block held before, NaN perhaps, which no mask
    makes harmless."""
    rows = torch.arange(len(gathered), device=gathered.device)
    blocks = gathered.unflatten(2, (-1, block_size))
    offsets = last_block[:, None] * block_size + torch.arange(block_size, device=gathered.device)
    stale = offsets >= context_lens[:, None]
    blocks[rows, :, last_block.long()] = blocks[rows, :, last_block.long()].masked_fill(stale[:, None, :, None], 0.0)


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    longest: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a chunk of queries a row: q [T, H, D], rows' queries one after the other; to `out` if given.

    Args:
        longest: the largest of `context_lens`, where the host knows it: short rows run in other tiles.
    """
    if q.is_cuda:
        from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

        return launch_paged_prefill_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            query_starts,
            scale,
            window,
            table_rows=table_rows,
            longest=longest,
            out=out,
        )
    block_table = _rows_table(block_table, context_lens, k_cache.shape[2], table_rows)
    out = torch.empty_like(q) if out is None else out
    group = q.shape[1] // k_cache.shape[1]
    starts = query_starts.tolist()
    for row, length in enumerate(context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        columns = -(-length // k_cache.shape[2])
        k, v = (gather_kv(cache, block_table[row : row + 1, :columns])[:, :, :length] for cache in (k_cache, v_cache))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mask = _chunk_mask(end - start, length, window, q.device)
        chunk = q[start:end].transpose(0, 1).unsqueeze(0)
        attended = F.scaled_dot_product_attention(chunk, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        out[start:end] = attended[0].transpose(0, 1)
    return out


def _chunk_mask(num_queries: int, length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which of `length` keys each of the last `num_queries` positions sees; None where plain causal says it."""
    if num_queries == length and (window is None or window >= length):
        return None
    positions = torch.arange(length - num_queries, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    visible = keys <= positions
    return visible if window is None else visible & (positions - keys < window)


def gather_kv(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Rows' keys or values side by side: [R, K, columns * block_size, D], in one gather and no second copy."""
    rows, columns = block_table.shape
    blocks, kv_heads, block_size, head_dim = cache.shape
    heads = torch.arange(kv_heads, device=cache.device)
    index = block_table[:, None, :].long() * kv_heads + heads[None, :, None]
    gathered = cache.view(blocks * kv_heads, block_size * head_dim).index_select(0, index.flatten())
    return gathered.view(rows, kv_heads, columns * block_size, head_dim)
