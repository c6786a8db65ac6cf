"""torch's profiler around a stretch of a rank's work, under vLLM's settings.

Owns which files a profile becomes: a trace for a browser (chrome://tracing, Perfetto), and a table of the operators.
Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raydata_llm.engine.redaction import masked_logger

logger = masked_logger(__name__)

# vLLM's names of what torch calls otherwise.
_OPTIONS = {
    "torch_profiler_with_stack": ("with_stack", True),
    "torch_profiler_with_flops": ("with_flops", False),
    "torch_profiler_record_shapes": ("record_shapes", False),
    "torch_profiler_with_memory": ("profile_memory", False),
}
_TABLE_ROWS = 100


class RankProfile:
    """A profile under way.

    Args:
        settings: vLLM's `profiler_config`, with `torch_profiler_dir`.
        name: How its files begin.
        device_type: Where the rank computes.
    """

    def __init__(self, settings: Mapping[str, Any], name: str, device_type: str) -> None:
        self._folder, self._name = Path(settings["torch_profiler_dir"]).expanduser(), name
        self._with_table = bool(settings.get("torch_profiler_dump_cuda_time_total", True))
        self._on_gpu = device_type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        options: dict[str, Any] = {
            name: bool(settings.get(theirs, default)) for theirs, (name, default) in _OPTIONS.items()
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = torch.profiler.tensorboard_trace_handler(
            str(self._folder), worker_name=name, use_gzip=bool(settings.get("torch_profiler_use_gzip", True))
        )
        self._profiler = torch.profiler.profile(activities=activities, on_trace_ready=trace, **options)
        self._profiler.start()

    def stop(self) -> None:
        """End it, and write its files."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.stop()
        if self._with_table:
            self._write_table()

    def _write_table(self) -> None:
        key = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        try:
            table = self._profiler.key_averages().table(sort_by=key, row_limit=_TABLE_ROWS)
        except UnicodeDecodeError as error:  # torch 2.13 hands over freed memory as names, where stacks are recorded
            logger.warning(
                "profile %s has its trace, but no table (%s): set torch_profiler_with_stack=False to have one",
                self._name,
                error,
            )
            return
        (self._folder / f"{self._name}.txt").write_text(table)
