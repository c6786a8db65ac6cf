"""A decode step's inputs on a GPU, in one launch where torch takes ten.

The equations and the reference are in decode_inputs.py; imported only where the tensors are on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raydata_llm.kernels.decode_inputs import DecodeInputs
from raydata_llm.kernels.integers import cdiv

_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows", "table_stride", "padding_slot"])
def _decode_inputs_kernel(
    slots_ptr: tl.tensor,
    last_token_ptr: tl.tensor,
    num_computed_ptr: tl.tensor,
    table_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    places_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    padding_slot: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots_ptr + row, mask=inside, other=0).to(tl.int64)
    live = inside & (slot < padding_slot)
    position = tl.load(num_computed_ptr + slot, mask=live, other=0)
    tl.store(num_computed_ptr + slot, position + 1, mask=live)
    wide = position.to(tl.int64)
    block = tl.load(table_ptr + slot * table_stride + wide // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    tl.store(token_ids_ptr + row, tl.load(last_token_ptr + slot, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(positions_ptr + row, wide, mask=inside)
    tl.store(places_ptr + row, block * BLOCK_SIZE + wide % BLOCK_SIZE, mask=inside)
    tl.store(lens_ptr + row, tl.where(live, position + 1, 0).to(tl.int32), mask=inside)


def launch_decode_inputs(
    slots: torch.Tensor,
    last_token: torch.Tensor,
    num_computed: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> DecodeInputs:
    """As `decode_inputs.decode_inputs`."""
    num_rows = len(slots)
    assert len(last_token) == len(num_computed) == len(block_table) and block_table.stride(1) == 1
    tokens, positions, places = (torch.empty(num_rows, dtype=torch.int64, device=slots.device) for _ in range(3))
    context_lens = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    if num_rows:
        _decode_inputs_kernel[(cdiv(num_rows, _BLOCK),)](
            slots,
            last_token,
            num_computed,
            block_table,
            tokens,
            positions,
            places,
            context_lens,
            num_rows,
            block_table.stride(0),
            len(num_computed) - 1,
            BLOCK_SIZE=block_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return DecodeInputs(tokens, positions, places, context_lens)
