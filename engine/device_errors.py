"""What the device says when it fails, in words that say what to change.

Owns the translation of torch's device errors. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceError(RuntimeError):
    """The device failed; its process is of no more use to an engine."""


class DeviceMemoryError(DeviceError):
    """The device ran out of memory."""


@contextmanager
def explained(doing: str, remedy: str) -> Iterator[None]:
    """Turn torch's device errors into ours.

    Args:
        doing: What was under way, as "while ..." goes on.
        remedy: What to change when memory ran out.

    Raises:
        DeviceMemoryError, DeviceError: with torch's error as the cause.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise DeviceMemoryError(f"out of GPU memory while {doing}: {remedy}. torch says: {first_line}") from error
    except torch.AcceleratorError as error:
        first_line = str(error).partition("\n")[0]
        raise DeviceError(
            f"the GPU failed while {doing}: {first_line}. The error may be of an earlier kernel: run with "
            "CUDA_LAUNCH_BLOCKING=1 to see which; its process must be started anew"
        ) from error
