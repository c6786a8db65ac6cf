"""Launch choices of the Triton kernels by GPU: tile sizes, warps and pipeline stages.

Owns the one table of tuned numbers; nothing is tuned at run time. Knows no kernel's inner workings. Invariant: every
choice fits the shared memory of the GPUs it is for (tests/kernels/test_triton_aot.py compiles them all).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One kernel's choice.

    Args:
        block_m: Query rows of a program; in decode the heads of a group, at least.
        block_n: Keys of an iteration.
        split_mask: Prefill only: run the keys that every query sees in a loop of their own, without masks.
    """

    block_m: int = 16
    block_n: int
    num_warps: int
    num_stages: int
    split_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class LinearTile:
    """The choice of a linear layer: rows and columns of a program's outputs, and products summed in an iteration."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# A program holds float32's operands in registers, as tensor cores do not take them.
_FLOAT32_LINEAR = LinearTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Choices for one kind of GPU.

    Args:
        decode, prefill: by bytes of a head (head_dim rounded up to a power of two), the most that the choice is for.
        short_prefill: Likewise, where no row sees more than SHORT_CONTEXT keys.
        split_decode: Likewise, where rows are so few that their keys are split: a program needs more bytes on the way.
        invariant: Likewise, of attention whose bits do not depend on the batch: decode and prefill in one tile.
        narrow, wide: Linear layers of that kind, with fewer outputs than _WIDE, and of others.
        programs_per_sm: Decode programs that an SM needs to run at the memory's speed; with fewer, keys are split.
    """

    decode: dict[int, Tile]
    split_decode: dict[int, Tile]
    prefill: dict[int, Tile]
    short_prefill: dict[int, Tile]
    invariant: dict[int, Tile]
    narrow: LinearTile
    wide: LinearTile
    programs_per_sm: int = 4

    def decode_tile(self, head_dim: int, dtype: torch.dtype, *, is_split: bool = False) -> Tile:
        """The choice for a head."""
        return _at_most(self.split_decode if is_split else self.decode, head_dim * dtype.itemsize)

    def prefill_tile(self, head_dim: int, dtype: torch.dtype, longest: int | None = None) -> Tile:
        """The choice for a head, and for the most keys that a row sees where that is known."""
        is_short = longest is not None and longest <= SHORT_CONTEXT
        return _at_most(self.short_prefill if is_short else self.prefill, _dot_bytes(head_dim, dtype))

    def invariant_tile(self, head_dim: int, dtype: torch.dtype) -> Tile:
        """The choice for a head, whatever the batch."""
        return _at_most(self.invariant, _dot_bytes(head_dim, dtype))

    def linear_tile(self, num_outputs: int, dtype: torch.dtype) -> LinearTile:
        """The choice for a weight, whatever the batch."""
        if dtype == torch.float32:
            return _FLOAT32_LINEAR
        return self.wide if num_outputs >= _WIDE else self.narrow


# Keys up to which a row's start and diagonal weigh more than its inner loop.
SHORT_CONTEXT = 1024
# Outputs of a linear layer from which on tiles of 128 columns fill a chip even with few rows.
_WIDE = 8192


def _dot_bytes(head_dim: int, dtype: torch.dtype) -> int:
    # Tensor cores do no float32 products; without them the operands stand in registers, and large tiles spill.
    return head_dim * dtype.itemsize * (2 if dtype == torch.float32 else 1)


def _at_most(tiles: dict[int, Tile], head_bytes: int) -> Tile:
    return next(tile for limit, tile in tiles.items() if head_bytes <= limit)


# 228 KB of shared memory an SM.
_HOPPER = Tuning(
    # Rows of 64 to 128 keys after a shared prefix, as they come 1,024 at a time: 201 us instead of the next table's 211
    # (heads of 256 bytes), 141 instead of 149 (128); rows of some hundred keys take the same in either.
    decode={
        128: Tile(block_n=64, num_warps=4, num_stages=3),
        256: Tile(block_n=32, num_warps=2, num_stages=3),
        512: Tile(block_n=32, num_warps=4, num_stages=3),
        1024: Tile(block_n=16, num_warps=4, num_stages=3),
    },
    split_decode={
        128: Tile(block_n=64, num_warps=4, num_stages=4),
        256: Tile(block_n=64, num_warps=4, num_stages=3),
        512: Tile(block_n=32, num_warps=4, num_stages=3),
        1024: Tile(block_n=16, num_warps=4, num_stages=3),
    },
    prefill={
        128: Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, split_mask=True),
        256: Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, split_mask=True),
        512: Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
        2048: Tile(block_m=16, block_n=16, num_warps=4, num_stages=2),
    },
    # Three programs an SM, so that one computes while others begin and end.
    short_prefill={
        256: Tile(block_m=64, block_n=64, num_warps=4, num_stages=3),
        512: Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
        2048: Tile(block_m=16, block_n=16, num_warps=4, num_stages=2),
    },
    # A decode row fills a group's heads of a tile: the fewest rows that wgmma takes.
    invariant={
        128: Tile(block_m=64, block_n=64, num_warps=4, num_stages=3),
        256: Tile(block_m=64, block_n=64, num_warps=4, num_stages=3),
        512: Tile(block_m=32, block_n=32, num_warps=4, num_stages=2),
        2048: Tile(block_m=16, block_n=16, num_warps=4, num_stages=2),
    },
    narrow=LinearTile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
    wide=LinearTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
)

# 99 KB a program: what every GPU from compute capability 8.0 on has.
_SMALL_PREFILL = {
    128: Tile(block_m=64, block_n=64, num_warps=4, num_stages=3),
    256: Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
    512: Tile(block_m=32, block_n=16, num_warps=4, num_stages=2),
    2048: Tile(block_m=16, block_n=16, num_warps=4, num_stages=2),
}
_SMALL_DECODE = {
    128: Tile(block_n=64, num_warps=4, num_stages=3),
    256: Tile(block_n=32, num_warps=4, num_stages=3),
    512: Tile(block_n=32, num_warps=4, num_stages=2),
    1024: Tile(block_n=16, num_warps=4, num_stages=2),
}
_SMALL = Tuning(
    decode=_SMALL_DECODE,
    split_decode=_SMALL_DECODE,
    prefill=_SMALL_PREFILL,
    short_prefill=_SMALL_PREFILL,
    invariant={
        128: Tile(block_m=32, block_n=64, num_warps=4, num_stages=3),
        256: Tile(block_m=32, block_n=32, num_warps=4, num_stages=2),
        512: Tile(block_m=32, block_n=16, num_warps=4, num_stages=2),
        2048: Tile(block_m=16, block_n=16, num_warps=4, num_stages=2),
    },
    narrow=LinearTile(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    wide=LinearTile(block_m=64, block_n=128, block_k=32, num_warps=4, num_stages=3),
)

BY_CAPABILITY = {(8, 0): _SMALL, (9, 0): _HOPPER}


@cache
def tuning_of(device: torch.device) -> Tuning:
    """The choices for a device; off CUDA (the interpreter) those that suit any GPU."""
    if device.type != "cuda":
        return _SMALL
    return BY_CAPABILITY.get(torch.cuda.get_device_capability(device), _SMALL)


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
