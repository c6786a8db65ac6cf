"""Compiling many kernels at once, where launches would compile them one after the other.

Triton compiles a kernel at its first launch, in 0.1 to 2 s. In a rehearsal, launches of kernels that are not compiled
are noted and left out; at its end threads compile what was noted, into Triton's own caches, where later launches find
it. Knows no kernel but those that must not be left out.

The 23 kernels of llama-3.2-1b for sm_90, nothing cached, 2 busy cores: Triton 3.6 (which has a C compiler build each
kernel's launcher) takes 14.2 s in turn and 7.6 s rehearsed, 3.7 8.4 and 5.8 s. A tenth of it needs Python's lock.

Invariant: the launches of other threads are not touched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import cpu_count
from typing import Any

import torch
import triton

# What a kernel that is left out should have written is whatever the memory held. Others compute with that to no harm,
# but torch must not take it for indices: the kernels that write these are compiled on the spot, and launched.
WRITES_INDICES = frozenset({"_decode_inputs_kernel"})


@contextmanager
def rehearsal(device: torch.device) -> Iterator[None]:
    """Leave out the launches within whose kernels are not compiled, and compile them at the end, many at a time.

    Args:
        device: The GPU that they are compiled for.
    """
    noted: dict[str, Any] = {}
    thread = threading.get_ident()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        is_left_out = threading.get_ident() == thread and fn.jit_function.fn.__name__ not in WRITES_INDICES
        if is_left_out:
            noted[compile["specialization_data"]] = fn.jit_function
        return is_left_out

    # Triton calls it before it compiles; True means that the launch is not wanted.
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    _compile(noted, device)


def _compile(noted: dict[str, Any], device: torch.device) -> None:
    def compile_one(specialization: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # `run` builds the launcher and loads the binary.
        _ = noted[specialization].preload(specialization).run

    with ThreadPoolExecutor(cpu_count(), "compile-kernels") as threads:
        list(threads.map(compile_one, noted))
