"""Where a tile of a row's keys lies in the paged cache; used by both attention kernels.

A cache [blocks, K, block_size, D] is a list of key rows of D elements; key j of KV head h stands in row

    (block_table[j / block_size] * K + h) * block_size + j % block_size

The lookup and its use are two functions, so that a loop can look up the next tile's blocks while it loads this one's
keys: looked up in the iteration that uses it, the compiler gives it a pipeline stage, one less for keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_blocks(
    table_ptr: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """Blocks of the keys start..start + BLOCK_N, or their one block where a tile lies in one.

    Args:
        table_ptr: The row's block table.
        start: A multiple of BLOCK_N.
        end: Keys from here on have no block.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        blocks = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        key = start + tl.arange(0, BLOCK_N)
        blocks = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0)
    return blocks


@triton.jit
def key_rows(
    blocks: tl.tensor,
    start: tl.tensor,
    kv_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Cache rows, int64, of the keys start..start + BLOCK_N in `blocks`."""
    first = (blocks.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
    if BLOCK_SIZE % BLOCK_N == 0:
        rows = first + start % BLOCK_SIZE + tl.arange(0, BLOCK_N)
    else:
        rows = first + (start + tl.arange(0, BLOCK_N)) % BLOCK_SIZE
    return rows
