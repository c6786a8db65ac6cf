"""Where a run's time goes on the GPU: kernels by name, and the gaps between them, from torch's profiler.

Owns the reading of a trace. A single stream is assumed: busy is the sum of what ran on the device.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

# Names of cuBLAS's kernels say their tiles; what they are for is enough here.
_GEMM = re.compile(r"gemm|nvjet|cutlass|splitK", re.IGNORECASE)
_PAUSE_S = 20e-6


@dataclass(frozen=True)
class Kernel:
    """One kernel's part: launches and seconds in all."""

    name: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """A run's wall time, the device's busy time in it, and the kernels by their share."""

    wall_s: float
    busy_s: float
    span_s: float
    kernels: list[Kernel]
    gaps: list[Kernel]

    @property
    def busy_share(self) -> float:
        """Busy time over the span from the first to the last thing on the device."""
        return self.busy_s / self.span_s

    def table(self, rows: int = 14) -> str:
        """The kernels that take most, and the gaps."""
        gap = Kernel("(gaps; those over 20 us by what is around them:)", 0, self.span_s - self.busy_s)
        lines = [f"wall {self.wall_s:.3f} s, device span {self.span_s:.3f} s, busy {self.busy_share:.1%}"]
        for kernel in [*self.kernels[:rows], gap, *self.gaps[:6]]:
            mean = f"{kernel.seconds / kernel.count * 1e6:9.1f} us" if kernel.count else " " * 12
            share, total = kernel.seconds / self.span_s, kernel.seconds * 1e3
            lines.append(f"{share:6.1%} {total:9.1f} ms {mean} {kernel.count:7} {kernel.name}")
        return "\n".join(lines)


def profiled(run: Callable[[], object]) -> Breakdown:
    """Run once under the profiler (which slows the host a little)."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    events = [event for event in recorded.profiler.kineto_results.events() if str(event.device_type()).endswith("CUDA")]
    spans = [(event.name(), event.start_ns(), event.duration_ns()) for event in events if event.duration_ns() > 0]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, _, duration in spans:
        entry = totals[_short(name)]
        entry[0] += 1
        entry[1] += duration / 1e9
    kernels = [Kernel(name, int(count), seconds) for name, (count, seconds) in totals.items()]
    kernels.sort(key=lambda kernel: kernel.seconds, reverse=True)
    first = min(start for _, start, _ in spans)
    last = max(start + duration for _, start, duration in spans)
    return Breakdown(wall, sum(kernel.seconds for kernel in kernels), (last - first) / 1e9, kernels, _gaps(spans))


def _gaps(spans: list[tuple[str, int, int]]) -> list[Kernel]:
    """Where the device waited for the host: pauses over 20 us, by the kernels before and after."""
    totals: dict[str, list[float]] = defaultdict(list)
    spans.sort(key=lambda span: span[1])
    for (before, start, duration), (after, begin, _) in itertools.pairwise(spans):
        pause = (begin - start - duration) / 1e9
        if pause > _PAUSE_S:
            totals[f"  {_short(before)[:28]} .. {_short(after)[:28]}"].append(pause)
    gaps = [Kernel(name, len(pauses), sum(pauses)) for name, pauses in totals.items()]
    return sorted(gaps, key=lambda gap: gap.seconds, reverse=True)


def _short(name: str) -> str:
    if _GEMM.search(name):
        return "GEMM"
    name = re.sub(r"<.*", "", name.removeprefix("void ").removeprefix("at::native::"))
    return name[:60]
