"""Which device an engine runs on, and in which dtype.

Owns these two choices and the refusal of impossible ones. Knows no sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from raydata_llm.engine.engine_config import NO_CPU_INVARIANCE, EngineConfig


class HasDtype(Protocol):
    """A model's config."""

    @property
    def dtype(self) -> str:
        """The checkpoint's own."""
        ...


def choose_device(config: EngineConfig) -> torch.device:
    """The device that `config.device` means here; sets the CPU threads.

    Raises:
        ValueError: if a GPU is asked for that is not there.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r} is not there: torch sees no GPU; use device='cpu'")
    device = torch.device("cuda" if config.device == "auto" else config.device)
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device={config.device!r} is not there: this machine has {count} GPU(s)")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def check_batch_invariant(config: EngineConfig, device: torch.device) -> None:
    """Refuse a promise that the device's libraries do not keep.

    Raises:
        ValueError: for `batch_invariant` on a CPU.
    """
    if config.batch_invariant and device.type == "cpu":
        raise ValueError(NO_CPU_INVARIANCE)


def choose_dtype(config: EngineConfig, model: HasDtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations.

    "auto" takes the checkpoint's, with two exceptions: a float32 checkpoint runs in bfloat16 on a GPU, and a 16-bit
    one runs in float32 on a CPU without bfloat16 instructions, which is slower in 16 bits than in 32.
    """
    if config.dtype != "auto":
        return _torch_dtype(config.dtype)
    if device.type == "cpu":
        return torch.bfloat16 if model.dtype == "bfloat16" and _cpu_has_bfloat16() else torch.float32
    return torch.bfloat16 if model.dtype == "float32" else _torch_dtype(model.dtype)


def _cpu_has_bfloat16() -> bool:
    # Measured with transformers on a 2-core AMD EPYC with avx512_bf16: 2 to 2.6 times float32's tokens/s.
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
