"""Arrays from the host to the device, and tokens back, without waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Triton compiles a kernel anew for pointers that are not multiples of this.
_ALIGNMENT = 16
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


def upload(device: torch.device, *arrays: npt.NDArray[Any]) -> list[torch.Tensor]:
    """One-dimensional arrays of int32, int64 or float32 on the device, all by one copy.

    From pageable memory a copy would first wait for all that was launched.
    """
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]).tolist()
    starts = [0, *ends[:-1]]
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes_of = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        bytes_of[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype])
        for start, array in zip(starts, arrays, strict=True)
    ]


class UploadBeside:
    """Copies to the device beside what the current stream runs; what it is given later waits for the copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, host: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; pinned memory is the caller's again once a later launch has been read."""
        if self.stream is None:
            return host.to(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.stream):
            there = host.to(self._device, non_blocking=True)
        current.wait_stream(self.stream)
        # It is the copies' stream's memory: not to be given to the next copy before the current stream is through.
        there.record_stream(current)
        return there


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, whole once what was launched is done."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def warm_up_pinned_memory() -> None:
    """Have pinned memory of every size that steps ask for: getting it from the driver waits for the device."""
    held = [torch.empty(1 << power, dtype=torch.uint8, pin_memory=True) for power in range(9, 23) for _ in range(4)]
    # They stay with torch's allocator, which hands them out again.
    del held
