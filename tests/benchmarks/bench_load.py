"""Loading a checkpoint from a cold disk, against what that disk gives a plain reader.

    python -m tests.benchmarks.bench_load --folder /some/disk [--gb 16] [--out FILE]

Writes random bfloat16 safetensors of the llama-3.1-8b shape, in shards of 5 GB, and a probe file beside them; drops
them from the page cache before each reading. The disk's speed is the best of four ways to read parts of the probe, each
part read once (`ratio`); and, as disks are often faster for the first gigabytes, that way over the whole checkpoint
(`ratio_whole`). The data are 256 MiB that repeat: a disk that compresses or deduplicates would be flattered, on both
sides. What a host under a virtual machine keeps of the files cannot be dropped or seen from inside.

`load` is what an engine does; `load_direct` reads past the page cache. After --limit seconds neither the latter nor the
whole checkpoint's plain reading is begun.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from raydata_llm.engine.decoder import Decoder
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.tensor_reader import read_tensors
from raydata_llm.engine.weights import load_weights, stored_tensors
from tests.benchmarks.workloads import SHAPES

_SHARD_BYTES = 5_000_000_000
_BLOCK_BYTES = 256 << 20
_READ_BYTES = 8 << 20
# Name: past the page cache or not, threads.
_WAYS = {"direct": (True, 1), "buffered": (False, 1), "buffered x8": (False, 8), "direct x8": (True, 8)}


def main(arguments: list[str] | None = None) -> int:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="on the disk to measure; what is written there is removed")
    parser.add_argument("--gb", type=float, default=16.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds")
    parser.add_argument("--out", help="file for the JSON")
    args = parser.parse_args(arguments)
    folder = Path(args.folder) / "bench_load"
    folder.mkdir(parents=True)
    try:
        result = measure(folder, args.gb, torch.device(args.device), args.limit)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(folder: Path, gb: float, device: torch.device, limit: float) -> dict[str, Any]:
    """Everything, from an empty folder."""
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context is not part of loading
    began = time.perf_counter()
    (folder / "config.json").write_text(json.dumps(scaled_config(gb)))
    config = ModelConfig.from_hf(scaled_config(gb))
    probe = folder / "probe"
    part = int(gb * 1e9 / 10) // _READ_BYTES * _READ_BYTES or _READ_BYTES
    num_bytes = write_files(folder, config, probe, len(_WAYS) * part)
    write_s = round(time.perf_counter() - began, 2)
    print(f"wrote {num_bytes / 1e9:.2f} GB and the probe in {write_s} s", file=sys.stderr, flush=True)

    cached: dict[str, float] = {}
    disk: dict[str, float] = {}
    for index, way in enumerate(_WAYS):
        cached[way] = drop([probe])
        disk[way] = plain_read([(probe, index * part, (index + 1) * part)], way)
    best = max(disk, key=lambda way: disk[way])
    result: dict[str, Any] = {
        "gb": round(num_bytes / 1e9, 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "disk_best": best,
        "disk_gb_s": disk,
        "still_cached": cached,
    }
    files = ModelFiles.open(str(folder))
    shards = list(files.weight_files)
    cached["load"] = drop(shards)
    result["load"] = time_load(files, config, device, direct=False)
    if time.perf_counter() - began < limit:
        cached["whole"] = drop(shards)
        result["disk_whole_gb_s"] = plain_read([(shard, 0, shard.stat().st_size) for shard in shards], best)
    if time.perf_counter() - began < limit:
        cached["load_direct"] = drop(shards)
        result["load_direct"] = time_load(files, config, device, direct=True)
    for name in ("load", "load_direct"):
        if name in result:
            speed = num_bytes / result[name]["seconds"] / 1e9
            result[name]["gb_s"] = round(speed, 3)
            result[name]["ratio"] = round(speed / disk[best], 3)
            result[name]["ratio_whole"] = round(speed / result["disk_whole_gb_s"], 3) if "whole" in cached else None
    return {**result, "write_s": write_s, "total_s": round(time.perf_counter() - began, 2)}


def scaled_config(gb: float) -> dict[str, Any]:
    """The llama-3.1-8b shape with as many layers as make `gb`; an eighth as wide where even a few would be too much."""
    shape = dict(SHAPES["llama-3.1-8b"])
    if gb < 4:
        for name in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"):
            shape[name] //= 8
    sizes = [
        sum(
            math.prod(shape)
            for shape in ModelConfig.from_hf({**shape, "num_hidden_layers": n}).parameter_shapes().values()
        )
        for n in (1, 2)
    ]
    layers = round((gb * 1e9 / 2 - sizes[0]) / (sizes[1] - sizes[0])) + 1
    return {**shape, "num_hidden_layers": max(1, layers)}


def write_files(folder: Path, config: ModelConfig, probe: Path, probe_bytes: int) -> int:
    """Write the shards, their index and the probe, to the disk itself; returns the shards' bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in config.parameter_shapes().items():
        if filled + 2 * math.prod(shape) > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * math.prod(shape)
    names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(-(2**63), 2**63 - 1, (_BLOCK_BYTES // 8,), generator=generator).view(torch.uint8).numpy().data
    with ThreadPoolExecutor(len(shards) + 1) as threads:
        written = [
            threads.submit(write_file, folder / file, *encode_header(shard), block, index)
            for index, (file, shard) in enumerate(zip(names, shards, strict=True))
        ]
        threads.submit(write_file, probe, b"", probe_bytes, block, len(shards)).result()
        return sum(one.result() for one in written)


def encode_header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """A safetensors header for bfloat16 tensors one after the other, and the bytes of these."""
    ends = [0]
    for shape in shapes.values():
        ends.append(ends[-1] + 2 * math.prod(shape))
    entries = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        for (name, shape), offsets in zip(shapes.items(), pairwise(ends), strict=True)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header, ends[-1]


def write_file(path: Path, header: bytes, num_bytes: int, block: memoryview, turn: int) -> int:
    """Write a header and `num_bytes` of the block, over and over, from another place of it in each file."""
    position = turn * 37_000_001 % _BLOCK_BYTES
    with path.open("wb", buffering=0) as file:
        file.write(header)
        left = num_bytes
        while left:
            written = file.write(block[position : min(_BLOCK_BYTES, position + left, position + _READ_BYTES)])
            left -= written
            position = (position + written) % _BLOCK_BYTES
        os.fsync(file.fileno())
    return len(header) + num_bytes


def drop(paths: list[Path]) -> float:
    """Drop files from the page cache; returns the share of them that is still there."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = sum(cached_bytes(path) for path in paths) / sum(path.stat().st_size for path in paths)
    if share > 0.01:
        print(f"WARNING: {share:.0%} of {paths[0].name} etc. is still in the page cache", file=sys.stderr, flush=True)
    return round(share, 4)


def cached_bytes(path: Path) -> int:
    """Of a file, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        blocks = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), blocks)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore failed for {path}")
    return mmap.PAGESIZE * bytes(blocks).count(1)


def plain_read(parts: list[tuple[Path, int, int]], way: str) -> float:
    """Read parts of files front to back into memory and forget it: GB/s."""
    direct, num_threads = _WAYS[way]
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    files = [os.open(path, flags) for path, _, _ in parts]
    pieces = [
        (file, position, min(_READ_BYTES, end - position))
        for file, (_, start, end) in zip(files, parts, strict=True)
        for position in range(start, end, _READ_BYTES)
    ]
    buffers = [mmap.mmap(-1, _READ_BYTES) for _ in range(num_threads)]
    for buffer in buffers:
        # A direct read into scattered 4 KiB of memory is slower on some virtual disks.
        buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer.write(bytes(_READ_BYTES))

    def read(turn: int) -> int:
        done = 0
        for file, position, size in pieces[turn::num_threads]:
            count = os.preadv(file, [buffers[turn]], position)
            assert count >= size, f"{count} of {size} bytes at {position}"
            done += size
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        done = sum(threads.map(read, range(num_threads)))
    seconds = time.perf_counter() - began
    for file in files:
        os.close(file)
    print(f"{way}: {done / 1e9:.2f} GB at {done / seconds / 1e9:.2f} GB/s", file=sys.stderr, flush=True)
    return round(done / seconds / 1e9, 3)


def time_load(files: ModelFiles, config: ModelConfig, device: torch.device, *, direct: bool) -> dict[str, float]:
    """Seconds from the open files to a decoder on the device, and what of them the decoder took on the host."""
    began = time.perf_counter()
    weights = (
        read_tensors(stored_tensors(files.weight_files, config), device, direct=True)
        if direct
        else load_weights(files, config, dtype=torch.bfloat16, device=device)
    )
    waits: list[float] = []
    decoder = Decoder(config, timed(weights, waits), max_model_len=1024, dtype=torch.bfloat16, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    del decoder
    found = {"seconds": round(seconds, 3), "not_waiting_s": round(seconds - sum(waits), 3)}
    if device.type == "cuda":
        found["device_peak_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


def timed(weights: Iterable[tuple[str, torch.Tensor]], waits: list[float]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights; notes how long each took to come."""
    iterator = iter(weights)
    while True:
        began = time.perf_counter()
        pair = next(iterator, None)
        waits.append(time.perf_counter() - began)
        if pair is None:
            return
        yield pair


if __name__ == "__main__":
    sys.exit(main())
