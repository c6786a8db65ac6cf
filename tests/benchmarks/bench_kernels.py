"""How fast the kernels are on this GPU: attention over ragged rows, small kernels, sampling; and the copy ceiling.

    python -m tests.benchmarks.bench_kernels [--out FILE] [--only decode prefill small sampling host] [--chosen]

With --chosen the tiles of the tuning table only, at block size 64, which takes a minute instead of ten.

Prints a table and, with --out, writes a JSON object a line. Decode attention counts the bytes of real tokens only, its
lengths drawn as ../shared/bench's `mixed` draws them, at a random moment of each row's life. Each kernel is timed cold:
the L2 cache is cleared before each launch. Compiling runs ahead in processes of its own (--jobs).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from raydata_llm.kernels.tuning import Tile, tuning_of


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int


SHAPES = {
    "qwen3-0.6b": Shape(16, 8, 128, 1024, 3072),
    "llama-3.2-1b": Shape(32, 8, 64, 2048, 8192),
    "llama-3.1-8b": Shape(32, 8, 128, 4096, 14336),
}
DECODE_TILES = [
    Tile(block_n=n, num_warps=warps, num_stages=stages)
    for n, warps, stages in [
        (32, 2, 3), (32, 2, 4), (32, 4, 4), (64, 2, 2), (64, 2, 3), (64, 2, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4),
        (64, 4, 5), (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3),
    ]
]  # fmt: skip
PREFILL_TILES = [
    Tile(block_m=m, block_n=n, num_warps=warps, num_stages=stages, split_mask=split)
    for m, n, warps, stages, split in [
        (128, 64, 8, 2, False), (128, 64, 8, 3, False), (128, 64, 8, 3, True), (128, 128, 8, 2, False),
        (128, 128, 8, 2, True), (64, 64, 4, 2, False), (64, 64, 4, 3, False), (64, 64, 4, 3, True),
        (64, 128, 4, 2, False), (128, 64, 4, 3, False), (128, 128, 8, 3, False),
    ]
]  # fmt: skip
# Queries and cached tokens of each row: prompts, short chunks after a cached prefix, one long prompt.
PREFILL_ROWS = {"32x512": [(512, 0)] * 32, "128x(2048+64)": [(64, 2048)] * 128, "1x16384": [(16384, 0)]}
BLOCK_SIZES = [16, 32, 64, 128]
MAX_ROWS, MAX_LENGTH = 1024, 2048

Record = dict[str, Any]


def milliseconds(function: Callable[[], Any], rep: int = 40) -> float:
    """Median time of a launch, L2 cold."""
    import triton

    return float(triton.testing.do_bench(function, warmup=8, rep=rep, return_mode="median"))


def mixed_lengths(rows: int) -> list[int]:
    """Context lengths of rows of `mixed`, each at a random moment of its life."""
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(rows):
        prompt = int(rng.integers(100, 1025))
        rng.integers(100, 128156, size=prompt)
        lengths.append((prompt, int(rng.integers(100, 1025))))
    moment = np.random.default_rng(1)
    return [prompt + int(moment.integers(0, output + 1)) for prompt, output in lengths]


class PagedRows:
    """A cache's memory, cut into blocks of any size, whose rows lie in shuffled blocks."""

    def __init__(self, shape: Shape, rows: int = MAX_ROWS, length: int = MAX_LENGTH) -> None:
        self._shape, self._rows, self._length = shape, rows, length
        size = rows * length * shape.kv_heads * shape.head_dim
        self._memory = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def copy_of(self, num_bytes: int) -> Callable[[], Any]:
        """A copy that reads and writes so many bytes, taken together."""
        elements = num_bytes // 4
        return partial(self._memory[0][:elements].copy_, self._memory[1][:elements])

    def cut(self, block_size: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K cache, V cache and block table."""
        shape = (-1, self._shape.kv_heads, block_size, self._shape.head_dim)
        columns = self._length // block_size
        order = torch.randperm(self._rows * columns, device="cuda", dtype=torch.int32)
        table = order[: rows * columns].view(rows, columns)
        return self._memory[0].view(shape), self._memory[1].view(shape), table


def bench_decode(model: str, only_chosen: bool) -> Iterator[Record]:
    """Paged decode attention: tiles at block size 64, then block sizes and the order of rows with the table's tile."""
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    shape = SHAPES[model]
    memory = PagedRows(shape)
    chosen = tuning_of(torch.device("cuda")).decode_tile(shape.head_dim, torch.bfloat16)

    def one(rows: int, block_size: int, tile: Tile, falling: bool = False) -> Record:
        lengths = mixed_lengths(rows)
        lengths = sorted(lengths, reverse=True) if falling else lengths
        context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        q = torch.randn((rows, shape.heads, shape.head_dim), device="cuda", dtype=torch.bfloat16)
        k_cache, v_cache, table = memory.cut(block_size, rows)
        scale = shape.head_dim**-0.5
        ms = milliseconds(
            lambda: launch_paged_decode_attention(q, k_cache, v_cache, table, context, scale, tile=tile, num_splits=1)
        )
        gigabytes = sum(lengths) * shape.kv_heads * shape.head_dim * 4 / 1e9
        case = f"rows {rows} block {block_size}" + (" falling" if falling else "")
        return {
            "op": "decode",
            "model": model,
            "case": case,
            "tile": name_of(tile),
            "ms": ms,
            "gb_s": gigabytes / ms * 1e3,
        }

    for rows in () if only_chosen else (256, 1024):
        for tile in DECODE_TILES:
            yield one(rows, 64, tile)
    for rows in (256, 512, 1024):
        for block_size in (64,) if only_chosen else BLOCK_SIZES:
            yield one(rows, block_size, chosen)
        yield one(rows, 64, chosen, falling=True)
        # A launch costs some microseconds whatever it moves: a copy of the same number of bytes pays them too.
        moved = sum(mixed_lengths(rows)) * shape.kv_heads * shape.head_dim * 4
        ms = milliseconds(memory.copy_of(moved))
        yield {"op": "copy", "model": model, "case": f"bytes of {rows} rows", "ms": ms, "gb_s": moved / ms / 1e6}
    yield from _few_rows(model, memory)


def _few_rows(model: str, memory: PagedRows) -> Iterator[Record]:
    """Rows too few to fill the chip: with and without split keys."""
    from raydata_llm.kernels.paged_decode_triton import choose_splits, launch_paged_decode_attention

    shape = SHAPES[model]
    choices = tuning_of(torch.device("cuda"))
    for rows in (1, 16, 64):
        q = torch.randn((rows, shape.heads, shape.head_dim), device="cuda", dtype=torch.bfloat16)
        caches = memory.cut(64, rows)
        context = torch.full((rows,), MAX_LENGTH, dtype=torch.int32, device="cuda")
        gigabytes = rows * MAX_LENGTH * shape.kv_heads * shape.head_dim * 4 / 1e9
        block_n = choices.decode_tile(shape.head_dim, torch.bfloat16, is_split=True).block_n
        chosen = choose_splits(rows * shape.kv_heads, MAX_LENGTH, block_n, q.device)
        for splits in sorted({1, 2, 4, 8, 16, 32, chosen}):
            tile = choices.decode_tile(shape.head_dim, torch.bfloat16, is_split=splits > 1)
            launch = partial(launch_paged_decode_attention, q, *caches, context, 0.1, tile=tile, num_splits=splits)
            ms = milliseconds(launch, rep=20)
            case = f"rows {rows} splits {splits}" + (" (chosen)" if splits == chosen else "")
            yield {
                "op": "decode",
                "model": model,
                "case": case,
                "tile": name_of(tile),
                "ms": ms,
                "gb_s": gigabytes / ms * 1e3,
            }


def bench_prefill(model: str, only_chosen: bool) -> Iterator[Record]:
    """Paged prefill attention, tiles at block size 64; torch's attention on the unpaged prompts beside it."""
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    shape = SHAPES[model]
    for name, rows in PREFILL_ROWS.items():
        longest = max(queries + cached for queries, cached in rows)
        chosen = tuning_of(torch.device("cuda")).prefill_tile(shape.head_dim, torch.bfloat16, longest)
        caches = PagedRows(shape, len(rows), -(-longest // 64) * 64).cut(64, len(rows))
        starts = torch.tensor([0, *np.cumsum([queries for queries, _ in rows])], dtype=torch.int32, device="cuda")
        context = torch.tensor([queries + cached for queries, cached in rows], dtype=torch.int32, device="cuda")
        q = torch.randn((int(starts[-1]), shape.heads, shape.head_dim), device="cuda", dtype=torch.bfloat16)
        pairs = sum(queries * cached + queries * (queries + 1) / 2 for queries, cached in rows)
        teraflop = 4 * pairs * shape.heads * shape.head_dim / 1e12
        for tile in (chosen,) if only_chosen else PREFILL_TILES:
            ms = milliseconds(partial(launch_paged_prefill_attention, q, *caches, context, starts, 0.1, tile=tile))
            yield {
                "op": "prefill",
                "model": model,
                "case": name,
                "tile": name_of(tile),
                "ms": ms,
                "tflop_s": teraflop / ms * 1e3,
            }
        if all(cached == 0 for _, cached in rows):
            ms = milliseconds(_torch_attention(shape, len(rows), rows[0][0]))
            yield {
                "op": "prefill",
                "model": model,
                "case": name,
                "tile": "torch sdpa",
                "ms": ms,
                "tflop_s": teraflop / ms * 1e3,
            }


def _torch_attention(shape: Shape, rows: int, length: int) -> Callable[[], Any]:
    q, k, v = (
        torch.randn((rows, heads, length, shape.head_dim), device="cuda", dtype=torch.bfloat16)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def bench_small(model: str) -> Iterator[Record]:
    """Norms, activation and the QKV pass: bytes read once and written once, over time."""
    from raydata_llm.kernels.qkv_to_cache import qkv_to_cache
    from raydata_llm.kernels.rms_norm import add_rms_norm
    from raydata_llm.kernels.swiglu import swiglu

    shape = SHAPES[model]
    on: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    weight, norm = torch.randn(shape.hidden, **on), torch.randn(shape.head_dim, **on)
    k_cache, v_cache, _ = PagedRows(shape, 64, 2048).cut(64, 64)
    rope = torch.randn((2048, shape.head_dim), device="cuda")
    for tokens in (1024, 16384):
        x, residual = torch.randn((tokens, shape.hidden), **on), torch.randn((tokens, shape.hidden), **on)
        gate_up = torch.randn((tokens, 2 * shape.intermediate), **on)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv = torch.randn((tokens, width), **on)
        slots = torch.randperm(64 * 2048, device="cuda")[:tokens]
        positions = slots % 2048
        cases: dict[str, tuple[Callable[[], Any], int]] = {
            "add_rms_norm": (lambda: add_rms_norm(x, residual, weight, 1e-5), 4 * tokens * shape.hidden),  # noqa: B023
            "swiglu": (lambda: swiglu(gate_up), 3 * tokens * shape.intermediate),  # noqa: B023
            "qkv_to_cache": (lambda: qkv_to_cache(qkv, positions, slots, rope, k_cache, v_cache), 2 * tokens * width),  # noqa: B023
            "qkv_to_cache+qk_norm": (
                lambda: qkv_to_cache(qkv, positions, slots, rope, k_cache, v_cache, norm, norm, 1e-6),  # noqa: B023
                2 * tokens * width,
            ),
        }
        for name, (function, elements) in cases.items():
            ms = milliseconds(function, rep=20)
            yield {"op": name, "model": model, "case": f"{tokens} tokens", "ms": ms, "gb_s": 2 * elements / ms / 1e6}


def bench_sampling() -> Iterator[Record]:
    """Tokens from logits, all rows of one kind; "flat" is what random weights give."""
    from raydata_llm.kernels.sampling import greedy, penalise_, sample

    vocab = 128256
    settings = {
        "temperature": (1.0, 0, 1.0, 0.0),
        "top_k 50 top_p 0.95": (0.8, 50, 0.95, 0.0),
        "top_p 0.9": (0.6, 0, 0.9, 0.0),
        "min_p 0.05": (1.0, 0, 1.0, 0.05),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for rows, spread in ((1024, 0.9), (1024, 3.0), (64, 0.9)):
            logits = (torch.randn((rows, vocab), device="cuda") * spread).to(dtype)
            keys = torch.randint(-(2**62), 2**62, (rows,), device="cuda")
            positions = torch.arange(rows, device="cuda")
            case = f"{rows} x {vocab} {str(dtype)[6:]} {'flat' if spread < 1 else 'peaked'}"
            yield {"op": "torch argmax", "case": case, "ms": milliseconds(lambda: logits.argmax(dim=-1), rep=20)}  # noqa: B023
            yield {"op": "greedy", "case": case, "ms": milliseconds(lambda: greedy(logits), rep=20)}  # noqa: B023
            for name, (temperature, top_k, top_p, min_p) in settings.items():
                parameters = (
                    torch.full((rows,), temperature, device="cuda"),
                    torch.full((rows,), top_k, device="cuda"),
                    torch.full((rows,), top_p, device="cuda"),
                    torch.full((rows,), min_p, device="cuda"),
                )
                cut = name != "temperature"
                ms = milliseconds(lambda: sample(logits, *parameters, keys, positions, any_truncated=cut), rep=20)  # noqa: B023
                yield {"op": f"sample {name}", "case": case, "ms": ms}
    logits = torch.randn((1024, vocab), device="cuda")
    in_prompt, counts = (
        torch.rand(logits.shape, device="cuda") < 0.01,
        torch.zeros(logits.shape, dtype=torch.int32, device="cuda"),
    )
    one = torch.ones(1024, device="cuda")
    ms = milliseconds(lambda: penalise_(logits, in_prompt, counts, one, one, one), rep=20)
    yield {"op": "penalise", "case": f"1024 x {vocab} float32", "ms": ms}


def bench_copy() -> Iterator[Record]:
    """The ceiling: a large copy, bytes read and bytes written."""
    source = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source))
    yield {"op": "copy", "case": "4.3 GB", "ms": ms, "gb_s": 2 * source.nbytes / ms / 1e6}


def bench_host() -> Iterator[Record]:
    """What a launch costs the host, without waiting for the device."""
    from raydata_llm.kernels.paged_attention import paged_decode_attention
    from raydata_llm.kernels.rms_norm import add_rms_norm

    x, weight = torch.randn((1, 1024), device="cuda"), torch.randn(1024, device="cuda")
    shape = SHAPES["llama-3.2-1b"]
    caches = PagedRows(shape, 2, 128).cut(64, 2)
    q = torch.randn((2, shape.heads, shape.head_dim), device="cuda", dtype=torch.bfloat16)
    context = torch.tensor([1, 1], dtype=torch.int32, device="cuda")
    cases: dict[str, Callable[[], Any]] = {
        "torch add": lambda: x + x,
        "add_rms_norm": lambda: add_rms_norm(x, x, weight, 1e-5),
        "decode attention": lambda: paged_decode_attention(q, *caches, context, 0.1),
    }
    for name, function in cases.items():
        for _ in range(50):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            function()
        yield {"op": "host", "case": name, "us": (time.perf_counter() - start) * 2e3}
        torch.cuda.synchronize()


def name_of(tile: Tile) -> str:
    """A tile in short: [block_m x] block_n, warps, stages."""
    block_m = f"{tile.block_m}x" if tile.block_m > 16 else ""
    return f"{block_m}{tile.block_n} w{tile.num_warps} s{tile.num_stages}{' split' if tile.split_mask else ''}"


def compile_ahead(part: int, parts: int) -> None:
    """Launch this part's share of what the benchmark compiles on tiny inputs, for Triton's cache on disk."""
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    work: list[Callable[[], Any]] = []
    for shape in SHAPES.values():
        memory = PagedRows(shape, 2, 128)
        q = torch.randn((2, shape.heads, shape.head_dim), device="cuda", dtype=torch.bfloat16)
        context = torch.tensor([1, 1], dtype=torch.int32, device="cuda")
        starts = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
        chosen = tuning_of(q.device).decode_tile(shape.head_dim, q.dtype)
        for tile, block_size in [*((tile, 64) for tile in DECODE_TILES), *((chosen, size) for size in BLOCK_SIZES)]:
            caches = memory.cut(block_size, 2)
            work.append(partial(launch_paged_decode_attention, q, *caches, context, 0.1, tile=tile, num_splits=1))
        for tile in PREFILL_TILES:
            caches = memory.cut(64, 2)
            work.append(partial(launch_paged_prefill_attention, q, *caches, context, starts, 0.1, tile=tile))
    for launch in work[part::parts]:
        launch()
    torch.cuda.synchronize()


def records(only: list[str], only_chosen: bool) -> Iterator[Record]:
    """All measurements that were asked for."""
    yield from bench_copy()
    for model in SHAPES:
        if "decode" in only:
            yield from bench_decode(model, only_chosen)
        if "prefill" in only:
            yield from bench_prefill(model, only_chosen)
        if "small" in only:
            yield from bench_small(model)
        torch.cuda.empty_cache()
    if "sampling" in only:
        yield from bench_sampling()
    if "host" in only:
        yield from bench_host()


def print_table(found: list[Record], ceiling: float) -> None:
    """A line a case: its tiles, best first, or its time."""
    cases: dict[tuple[str, ...], list[Record]] = {}
    for record in found:
        cases.setdefault((record["op"], record.get("model", ""), record["case"]), []).append(record)
    for (op, model, case), group in cases.items():
        cells = []
        for record in sorted(group, key=lambda record: record.get("ms", 0.0)):
            if "tflop_s" in record:
                figure = f"{record['tflop_s']:.0f}TF"
            elif "gb_s" in record:
                figure = f"{record['gb_s']:.0f}GB/s {record['gb_s'] / ceiling:.0%}"
            else:
                figure = f"{record['us']:.1f}us" if "us" in record else f"{record['ms']:.3f}ms"
            cells.append(f"{figure} {record['tile']}" if len(group) > 1 else figure)
        print(f"{op:9} {model:12} {case:22} {' | '.join(cells[:6])}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["decode", "prefill", "small", "sampling", "host"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--chosen", action="store_true", help="only the tiles of the tuning table")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--compile-part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_part is not None:
        compile_ahead(options.compile_part, options.jobs)
        return
    start = time.perf_counter()
    if not options.chosen:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_kernels",
            "--jobs",
            str(options.jobs),
            "--compile-part",
        ]
        compilers = [subprocess.Popen([*command, str(part)]) for part in range(options.jobs)]
        assert not any(compiler.wait() for compiler in compilers), "a process that compiles ahead failed"
        print(f"compiled in {time.perf_counter() - start:.0f} s on {torch.cuda.get_device_name()}", flush=True)
    found = []
    for record in records(options.only, options.chosen):
        found.append(record)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**record, "gpu": torch.cuda.get_device_name()}) + "\n")
    print_table(found, found[0]["gb_s"])
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
