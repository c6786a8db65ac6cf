"""CUDA graphs that share one memory pool.

Owns how graphs are captured; knows not what. Invariants: capture is in thread-local mode (other threads of the process
may use CUDA meanwhile); graphs of one pool run on one stream, one after the other; a pool that has lost its last graph
takes no other, so who makes graphs for a while takes a pool of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


class GraphPool:
    """See the module's docstring."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, run: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
        """A graph of what a function launches, and what it returned; all that it launches has run before."""
        # Not torch.cuda.graph(): that waits for the device and collects garbage first.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        return graph, result
