"""How large things may be: the sizes that settings leave open, and the KV blocks that the device has room for.

Owns these figures and the errors that say what would fit. Invariant: what it returns holds at least one sequence of
`max_model_len`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from raydata_llm.engine.beam_params import MOST_BEAMS
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.parameter_check import Parameters

# Share of the memory free at start that KV may take on a CPU, where other processes (and other replicas) live too.
_CPU_KV_SHARE = 0.25
# Activations of a step on a GPU, per token: the widest tensors alive at once, as multiples of hidden and intermediate.
_LIVE_HIDDEN, _LIVE_INTERMEDIATE = 8, 3
# Of a slot, in the arrays of its state on host and device: some 40 of up to 8 bytes.
_SLOT_BYTES = 512
# Embeddings of a prompt, as they come (float32) and in the model's dtype.
_LIVE_EMBEDS = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Settled sizes, as `EngineConfig` names them."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int

    @property
    def num_slots(self) -> int:
        """Rows that the device keeps state of: those that run at once, or the beams of one prompt."""
        return max(self.max_num_seqs, min(MOST_BEAMS, self.max_num_batched_tokens))

    def fitted(self, num_blocks: int) -> Sizes:
        """These sizes where there are so many KV blocks, the trash block included."""
        room = (num_blocks - 1) * self.block_size
        return self if room >= self.max_model_len else replace(self, max_model_len=room)


def check_sizes(config: EngineConfig, model: ModelConfig, device: torch.device) -> Sizes:
    """Fill in the sizes that were left open.

    Raises:
        ValueError: for sizes that contradict each other or the model.
    """
    on_gpu = device.type == "cuda"
    max_model_len = model.context_length if config.fits_model_len else config.max_model_len or model.context_length
    if max_model_len > model.context_length:
        raise ValueError(
            f"max_model_len={max_model_len} is more than the model was made for: give {model.context_length} or less, "
            "or set rope scaling by hf_overrides"
        )
    max_num_seqs = config.max_num_seqs or (1024 if on_gpu else 64)
    # Without chunks a prompt must fit a step whole.
    least = max(max_num_seqs, 1 if config.enable_chunked_prefill else max_model_len)
    max_num_batched_tokens = config.max_num_batched_tokens or max(least, 16384 if on_gpu else 1024)
    if max_num_batched_tokens < least:
        reason = (
            f"max_num_seqs={max_num_seqs}"
            if least == max_num_seqs
            else f"max_model_len={max_model_len} while enable_chunked_prefill=False"
        )
        raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens} is less than {reason}: give {least} or more")
    return Sizes(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=config.block_size or (64 if on_gpu else 16),
    )


def check_weights_fit(
    model: Parameters, dtype: torch.dtype, device: torch.device, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuse a model whose weights the device has no room for, before the first is read.

    Args:
        shapes: Of the rank's part, if it is not the whole model.

    Raises:
        ValueError: with the memory needed and free.
    """
    parts = model.parameter_shapes() if shapes is None else shapes
    needed = sum(math.prod(shape) for shape in parts.values()) * dtype.itemsize
    free = _free_bytes(device)
    if needed > free:
        raise ValueError(
            f"the weights of this {model.architecture} take {needed / 2**30:.1f} GiB in {dtype} and {device} has "
            f"{free / 2**30:.1f} GiB free: use a smaller model or dtype, a GPU with more room, or a larger "
            "tensor_parallel_size"
        )


def check_row_fits(max_model_len: int, row_bytes: int, config: EngineConfig, device: torch.device) -> None:
    """Refuse a length for which there is no room, before the first tensor is made.

    Args:
        max_model_len: Tokens of a row at most.
        row_bytes: What one token of a row takes.
        config: Whether the length is the user's or the model's.
        device: Where the memory is.

    Raises:
        ValueError: with a length that would do.
    """
    free = _free_bytes(device)
    if max_model_len * row_bytes <= free:
        return
    source = "" if config.max_model_len else " (the model's max_position_embeddings and its RoPE scaling)"
    raise ValueError(
        f"max_model_len={max_model_len}{source} needs {max_model_len * row_bytes / 2**30:.1f} GiB of memory for a "
        f"single row and {device} has {free / 2**30:.1f} GiB free: set max_model_len={max(1, free // row_bytes // 2)} "
        "or less"
    )


def rope_bytes(head_dim: int) -> int:
    """Bytes of RoPE's table for one position, while it is made: angles, cosines and sines beside it."""
    return 3 * 4 * head_dim


def check_slots_fit(
    config: EngineConfig, model: ModelConfig, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse sizes for which there is no room, before the first tensor is made: of one row, and of all slots.

    Args:
        model: The rank's part.

    Raises:
        ValueError: naming the setting to lower.
    """
    row_bytes = model.kv_bytes_per_token(dtype.itemsize) + rope_bytes(model.head_dim)
    check_row_fits(sizes.max_model_len, row_bytes, config, device)
    # Block tables are on the device and on the host.
    slot_bytes = 2 * 4 * -(-sizes.max_model_len // sizes.block_size) + _SLOT_BYTES
    token_bytes = 0
    if device.type == "cuda":  # where the largest step's memory is put aside
        slot_bytes += 4 * model.vocab_size
        token_bytes = (model.hidden_size + model.intermediate_size) * dtype.itemsize
    free = _free_bytes(device)
    for name, needed in (
        ("max_num_seqs", sizes.max_num_seqs * slot_bytes),
        ("max_num_batched_tokens", sizes.max_num_batched_tokens * token_bytes),
    ):
        if needed > free:
            raise ValueError(
                f"{name}={getattr(sizes, name)} needs {needed / 2**30:.1f} GiB of memory and {device} has "
                f"{free / 2**30:.1f} GiB free: lower {name}"
            )


def num_kv_blocks(
    config: EngineConfig,
    model: ModelConfig,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    num_ranks: int = 1,
) -> int:
    """Blocks to allocate, the trash block included; call it when the weights are loaded.

    Args:
        model: The rank's part.
        num_ranks: Ranks that share a CPU's memory.

    Raises:
        ValueError: if not even one sequence of `max_model_len` fits, with the length that would; with
            `max_model_len=-1`, if no block does.
    """
    block_bytes = sizes.block_size * model.kv_bytes_per_token(dtype.itemsize)
    blocks_per_seq = -(-sizes.max_model_len // sizes.block_size)
    if config.num_gpu_blocks_override is not None:
        usable = config.num_gpu_blocks_override
        source = f"num_gpu_blocks_override={usable}"
    else:
        memory, source = _kv_memory(config, model, sizes, dtype, device, num_ranks)
        usable = int(memory // block_bytes) - 1
    if usable < (1 if config.fits_model_len else blocks_per_seq):
        fits = max(0, usable * sizes.block_size)
        remedy = f"set max_model_len={fits} or less, or give it more memory" if fits else "give it more memory"
        raise ValueError(
            f"max_model_len={sizes.max_model_len} needs {blocks_per_seq * block_bytes / 2**20:.1f} MiB of KV memory "
            f"for a single row, and {source} leaves {max(0, usable) * block_bytes / 2**20:.1f} MiB: {remedy}"
        )
    # More than all slots can hold is of use to the prefix cache only; twice that is plenty.
    usable = min(usable, 2 * sizes.max_num_seqs * blocks_per_seq)
    _check_room((usable + 1) * block_bytes, source, device)
    return usable + 1


def _check_room(kv_bytes: int, source: str, device: torch.device) -> None:
    """Refuse KV memory that was asked for by figure and is not there."""
    free = _free_bytes(device)
    if kv_bytes > free:
        raise ValueError(
            f"{source} makes {kv_bytes / 2**30:.1f} GiB of KV memory and {device} has {free / 2**30:.1f} GiB free: "
            "ask for less, or leave it out to have it sized by what is free"
        )


def _kv_memory(
    config: EngineConfig,
    model: ModelConfig,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    num_ranks: int,
) -> tuple[float, str]:
    """Bytes for KV, and where the figure comes from."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
    if device.type == "cpu":
        return _CPU_KV_SHARE * _free_host_memory() / num_ranks, f"{_CPU_KV_SHARE:.0%} of this machine's free memory"
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    reserve = _activation_bytes(model, sizes, dtype, embeds=config.enable_prompt_embeds)
    memory = config.gpu_memory_utilization * total - used - reserve
    return memory, f"gpu_memory_utilization={config.gpu_memory_utilization} of {total / 2**30:.1f} GiB"


def _activation_bytes(model: ModelConfig, sizes: Sizes, dtype: torch.dtype, *, embeds: bool) -> int:
    live_hidden = _LIVE_HIDDEN + (_LIVE_EMBEDS if embeds else 0)
    per_token = live_hidden * model.hidden_size + _LIVE_INTERMEDIATE * model.intermediate_size
    logits = 3 * sizes.num_slots * model.vocab_size * 4
    return sizes.max_num_batched_tokens * per_token * dtype.itemsize + logits


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()


def _free_host_memory() -> int:
    """Bytes that this process may still take: the machine's available memory, or the container's limit if lower."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: what is available is not told, so half of all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    room = container_room(Path("/sys/fs/cgroup"))
    return available if room is None else max(0, min(available, room))


def container_room(folder: Path) -> int | None:
    """Bytes that a container may still take, by its cgroup's folder; None without a limit.

    Files that it has read count as used, and are given up for anything else: weights and data sets, mostly.
    """
    limit, used, detail = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    lines = detail.read_text().splitlines() if detail.exists() else []
    files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return int(limit.read_text()) - int(used.read_text()) + files
