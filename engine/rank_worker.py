"""Makes a rank's worker of what the engine told it.

Owns the joining of the ranks, and which device each has. Knows no steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from raydata_llm.engine.device import choose_device
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.rank_line import LineAddress
from raydata_llm.engine.rank_store import RankStore
from raydata_llm.engine.shard import RankPlace
from raydata_llm.engine.worker import Worker

_JOIN_SECONDS = 120.0


def load_worker(told: Mapping[str, Any], gpu: int, key: str) -> Worker:
    """Join the other ranks and load the shard.

    Args:
        told: `rank`, `config` (fields of EngineConfig), `store` (the address of the engine's store).
        gpu: Which of the visible GPUs is this rank's.
        key: Of the engine's lines.
    """
    config = EngineConfig(**told["config"])
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = choose_device(dataclasses.replace(config, device=f"cuda:{gpu}") if on_gpu else config)
    if on_gpu:
        torch.cuda.set_device(device)
    place = RankPlace.of(told["rank"], config.tensor_parallel_size, config.pipeline_parallel_size)
    store = RankStore(LineAddress.read(told["store"], key).dial(place.rank), _JOIN_SECONDS)
    files = ModelFiles.open(config.model, load_format=config.load_format, hf_overrides=config.hf_overrides)
    parallel = ParallelState(place, device, store, small_sums=not config.disable_custom_all_reduce)
    return Worker(config, files, files.model_config(), parallel)
