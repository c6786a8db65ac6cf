"""The inputs of a decode step, made of what the device knows of each slot, so that the host need not know a token.

    position[r] = num_computed[s]        s = slots[r]
    token[r]    = last_token[s]
    place[r]    = block_table[s, position / block_size] * block_size + position % block_size
    length[r]   = position + 1           keys that the row attends to, itself included
    num_computed[s] += 1

The last slot stands for no sequence: rows that pad a batch name it. They get position 0, a place in the trash block
and length 0, and leave it as it is.

Shapes: R rows, S slots and the padding slot; slots [R], last_token and num_computed [S + 1], block_table
[S + 1, columns], the padding slot's row being trash blocks; all integer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodeInputs(NamedTuple):
    """token_ids, positions and places (the slot mapping) [R] int64, context_lens [R] int32."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor


def decode_inputs_ref(
    slots: torch.Tensor,
    last_token: torch.Tensor,
    num_computed: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> DecodeInputs:
    """The equation; advances `num_computed` in place."""
    live = slots < len(num_computed) - 1
    positions = torch.where(live, num_computed[slots], 0).long()
    blocks = block_table[slots, positions // block_size].long()
    context_lens = torch.where(live, positions + 1, 0).int()
    num_computed[slots[live]] += 1
    return DecodeInputs(last_token[slots].long(), positions, blocks * block_size + positions % block_size, context_lens)


def decode_inputs(
    slots: torch.Tensor,
    last_token: torch.Tensor,
    num_computed: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> DecodeInputs:
    """Make the inputs and advance `num_computed` in place; a slot other than the padding occurs once."""
    if slots.is_cuda:
        from raydata_llm.kernels.decode_inputs_triton import launch_decode_inputs

        return launch_decode_inputs(slots, last_token, num_computed, block_table, block_size)
    return decode_inputs_ref(slots, last_token, num_computed, block_table, block_size)
