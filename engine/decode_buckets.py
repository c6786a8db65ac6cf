"""The numbers of rows that decode steps are padded to, which are those that CUDA graphs are captured for.

Owns their choice, by measurement: what a library's matrix products take is no smooth function of their rows. On an H100
the linears of an 8b model take 14.1 ms for 448 rows and 9.7 ms for 512, or 20.4 ms for 832 and 15.7 ms for 800: the
rows between are better padded. Knows no requests and no plans. Invariant: the ranks of a tensor-parallel group choose
alike, as the sums in their graphs are of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from raydata_llm.engine.decoder import Decoder, Linear
from raydata_llm.engine.graph_pool import GraphPool

# A size earns its graph if it is faster by this share than the next larger one.
_LEAST_GAIN = 0.03
# Weights that are read between two uses of one: more than any GPU's cache holds.
_MEASURED_BYTES = 128 << 20
_REPLAYS = 3
# What a layer's other kernels take of few rows (H100).
_LAYER_SECONDS = 20e-6


def measured_buckets(decoder: Decoder, max_rows: int) -> dict[int, float]:
    """The sizes up to `max_rows` that are worth a graph, ascending, and the seconds of a step of each."""
    sizes = candidate_sizes(max_rows)
    linears = _linears(decoder)
    measured = _some(linears)
    seconds = linear_seconds(measured, sizes)
    if decoder.parallel.place.tp_size > 1:
        seconds = decoder.parallel.all_reduce_by_group(seconds.to(decoder.device)).cpu()
    scale = _num_bytes(linears) / _num_bytes(measured)
    rest = _LAYER_SECONDS * len(decoder.layers)
    step_seconds = {size: took * scale + rest for size, took in zip(sizes, seconds.tolist(), strict=True)}
    return {size: step_seconds[size] for size in worthwhile_sizes(sizes, seconds.tolist())}


def candidate_sizes(max_rows: int) -> list[int]:
    """Sizes to measure: by 32 rows, from 1,024 on by a thirty-second."""
    sizes = [16]
    while sizes[-1] < max_rows:
        step = 16 if sizes[-1] < 64 else max(32, 1 << (sizes[-1].bit_length() - 6))
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < max_rows] + [max_rows]


def worthwhile_sizes(sizes: Sequence[int], seconds: Sequence[float]) -> list[int]:
    """Of ascending sizes those that are faster than every larger one, and the largest."""
    chosen, best = [sizes[-1]], seconds[-1]
    for size, took in zip(sizes[-2::-1], seconds[-2::-1], strict=True):
        if took < best * (1 - _LEAST_GAIN):
            chosen.append(size)
            best = took
    return chosen[::-1]


def fixed_buckets(max_rows: int) -> list[int]:
    """Sizes where nothing is to depend on a measurement: by about an eighth, 64 rows at least where rows are many."""
    buckets = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
    step = 64
    while buckets[-1] < max_rows:
        step = max(step, 1 << (buckets[-1].bit_length() - 5))
        buckets.append(buckets[-1] + step)
    return [bucket for bucket in buckets if bucket < max_rows] + [max_rows]


def linear_seconds(linears: Sequence[Linear], sizes: Sequence[int]) -> torch.Tensor:
    """[sizes] seconds that some linears take together, each size's best of a few runs."""
    weight = linears[0].weight
    inputs = {
        width: torch.randn((sizes[-1], width), dtype=weight.dtype, device=weight.device)
        for width in {linear.weight.shape[1] for linear in linears}
    }

    def run(size: int) -> None:
        for linear in linears:
            linear(inputs[linear.weight.shape[1]][:size])

    pool, timed = GraphPool(weight.device), []
    for size in reversed(sizes):
        run(size)  # its kernels are loaded then
        graph, _ = pool.capture(partial(run, size))
        timed.append((graph, _replayed(graph)))
    torch.cuda.synchronize(weight.device)
    best = [min(begin.elapsed_time(end) for begin, end in events) for _, events in reversed(timed)]
    return torch.tensor(best) / 1e3


def _replayed(graph: torch.cuda.CUDAGraph) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Events around some replays."""
    pairs = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        pairs.append((begin, end))
    return pairs


def _linears(decoder: Decoder) -> list[Linear]:
    return [linear for layer in decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]


def _some(linears: list[Linear]) -> list[Linear]:
    """The first layers', as many as make `_MEASURED_BYTES`."""
    per_layer = 4
    layers = -(-_MEASURED_BYTES // _num_bytes(linears[:per_layer]))
    return linears[: per_layer * layers]


def _num_bytes(linears: Sequence[Linear]) -> int:
    return sum(linear.weight.nbytes for linear in linears)
