"""Which tensor- and pipeline-parallel sizes a model wants on a GPU.

`python -m raydata_llm.cluster.advice CONFIG --gpu h100` prints it. Owns the arithmetic: weights and KV by the config's
sizes, a decode step's time by what it reads and multiplies. Knows neither torch nor an engine. Its tokens/s are bounds
of the hardware times a share that was measured on one GPU, to compare sizes with; none was measured on several.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GIB = 2**30
# Of a GPU's memory, for weights and KV; the rest is activations, logits and graphs.
_USABLE = 0.85
# Of the bound of memory and arithmetic. Measured: `decode` of three shapes on one H200 at d75e0e9 (84,291, 129,454 and
# 26,452 tokens/s; tests/benchmarks/results), of which this gives 0.94, 1.07 and 0.96.
_REACHED = 0.72
# Assumed of each stage beyond the first: stages are never quite even, and the ends of a job leave some idle.
_LOST_PER_STAGE = 0.1
# A larger replica is advised only where the estimate gains this much: replicas cost each other nothing, and a GPU that
# is lost costs a small one less.
_CLEAR_GAIN = 1.15
# Assumed of each sum over ranks, whatever its size.
_SUM_SECONDS = 15e-6
_BYTES = 2
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Data sheet figures: memory in bytes, bytes/s of memory and of links one way, dense bf16 FLOP/s."""

    memory: float
    bandwidth: float
    link: float
    flops: float


GPUS = {
    "a100": Gpu(memory=80e9, bandwidth=2.0e12, link=300e9, flops=312e12),
    "h100": Gpu(memory=80e9, bandwidth=3.35e12, link=450e9, flops=989e12),
    "h200": Gpu(memory=141e9, bandwidth=4.8e12, link=450e9, flops=989e12),
    "l4": Gpu(memory=24e9, bandwidth=0.3e12, link=32e9, flops=121e12),
}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One choice of sizes: bytes of weights a GPU, tokens of KV a replica, rows at once, tokens/s of each GPU."""

    tp_size: int
    pp_size: int
    weight_bytes: float
    kv_tokens: int
    rows: int
    tokens_per_gpu: float


def advise(config: Mapping[str, Any], gpu: Gpu, num_gpus: int = 8, row_tokens: int = 1024) -> list[Advice]:
    """The sizes up to `num_gpus` that fit: the advised ones, then by tokens/s of each GPU.

    Advised are the fewest GPUs a replica whose figure is near the best one.

    Args:
        config: A config.json.
        row_tokens: KV tokens that a row holds on average.
    """
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads, width = config.get("num_key_value_heads") or heads, config["intermediate_size"]
    found = []
    for tp_size in range(1, 17):
        splits = heads % tp_size == 0 and width % tp_size == 0
        if not splits or (kv_heads % tp_size and tp_size % kv_heads):
            continue
        for pp_size in (1, 2, 4, 8):
            if tp_size * pp_size <= num_gpus and pp_size <= layers:
                advice = _advise(config, gpu, tp_size, pp_size, row_tokens)
                if advice is not None:
                    found.append(advice)
    found.sort(key=lambda one: -one.tokens_per_gpu)
    near = [one for one in found if one.tokens_per_gpu * _CLEAR_GAIN >= found[0].tokens_per_gpu]
    smallest = min(near, key=lambda one: one.tp_size * one.pp_size, default=None)
    return sorted(found, key=lambda one: one is not smallest)


def read_config(path: Path) -> Mapping[str, Any]:
    """A model's config.json.

    Args:
        path: The file, or the folder that it lies in.

    Raises:
        ValueError: where it is no config of a dense decoder, which is all that this arithmetic is for.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a config.json: {error}") from error
    missing = [name for name in _NEEDED if not isinstance(config, dict) or name not in config]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: give the config.json of a text model that is a decoder")
    experts = [name for name in _EXPERTS if config.get(name)]
    if experts:
        raise ValueError(f"{path} has {experts[0]}={config[experts[0]]}: the engine runs no mixture of experts")
    found: Mapping[str, Any] = config
    return found


def _advise(config: Mapping[str, Any], gpu: Gpu, tp_size: int, pp_size: int, row_tokens: int) -> Advice | None:
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    layer = 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * config["intermediate_size"]
    tables = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    num_gpus, parameters = tp_size * pp_size, layers * layer + tables
    # A stage at one end holds more than its even share.
    weights = _BYTES * (-(-layers // pp_size) * layer + tables / min(pp_size, 2)) / tp_size
    kv_token = 2 * -(-layers // pp_size) * max(kv_heads / tp_size, 1) * head_dim * _BYTES
    kv_tokens = int((_USABLE * gpu.memory - weights) / kv_token)
    rows = min(1024 * num_gpus, kv_tokens // row_tokens)
    if rows < 1:
        return None
    # A stage has a part of the rows in flight at a time, and all stages work at once.
    batch = max(1, rows // pp_size)
    reads = (weights + batch * row_tokens * kv_token) / gpu.bandwidth
    multiplies = 2 * batch * parameters / num_gpus / gpu.flops
    moved = 2 * (tp_size - 1) / tp_size * batch * hidden * _BYTES
    sums = 2 * layers / pp_size * (_SUM_SECONDS + moved / gpu.link)
    seconds = (reads + multiplies) / _REACHED + (sums if tp_size > 1 else 0)
    return Advice(
        tp_size=tp_size,
        pp_size=pp_size,
        weight_bytes=weights,
        kv_tokens=kv_tokens,
        rows=rows,
        tokens_per_gpu=batch / seconds / num_gpus * (1 - _LOST_PER_STAGE) ** (pp_size - 1),
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the advice."""
    parser = argparse.ArgumentParser(description="Sizes for a model, those advised first; tokens/s are estimates.")
    parser.add_argument("config", type=Path, help="config.json, or the folder that it lies in")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a replica at most")
    parser.add_argument("--row-tokens", type=int, default=1024, help="tokens of a row's KV on average")
    asked = parser.parse_args(arguments)
    try:
        config = read_config(asked.config)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    advice = advise(config, GPUS[asked.gpu], asked.gpus, asked.row_tokens)
    if not advice:
        raise SystemExit(f"no sizes up to {asked.gpus} {asked.gpu} hold this model: allow more with --gpus")
    print(f"{'tp':>3} {'pp':>3} {'weights GiB/GPU':>16} {'KV tokens':>10} {'rows':>6} {'est. tokens/s/GPU':>18}")
    for one in advice:
        weights = one.weight_bytes / _GIB
        sizes = f"{one.tp_size:>3} {one.pp_size:>3} {weights:>16.1f} {one.kv_tokens:>10} {one.rows:>6}"
        print(f"{sizes} {one.tokens_per_gpu:>18.0f}")
    best = advice[0]
    print(
        f"advised: tensor_parallel_size={best.tp_size}, pipeline_parallel_size={best.pp_size}, and for concurrency the "
        f"number of GPUs divided by {best.tp_size * best.pp_size}"
    )


if __name__ == "__main__":
    main()
