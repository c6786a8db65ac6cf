"""Whole prompts side by side, without padding: what a pooling model computes at once.

Shapes: R rows, T tokens of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raydata_llm.engine.pooling_request import PoolingRequest


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Some requests' tokens.

    Args:
        token_ids: [T] int64 on the device.
        positions: [T] int64 on the device; each row counts from 0.
        token_types: [T] int64 on the device; None where all are 0.
        row_of: [T] int64 on the device; the row of each token.
        ids: [T] `token_ids` on the host.
        starts: [R + 1] on the host; row r's tokens are starts[r] to starts[r + 1] - 1.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    token_types: torch.Tensor | None
    row_of: torch.Tensor
    ids: np.ndarray
    starts: list[int]

    @classmethod
    def of(cls, requests: Sequence[PoolingRequest], device: torch.device) -> PackedRows:
        """Pack the requests' prompts, in their order."""
        prompts = [np.asarray(request.prompt_token_ids) for request in requests]
        ids = np.concatenate(prompts)
        lens = np.array([len(prompt) for prompt in prompts])
        starts = [0, *itertools.accumulate(lens.tolist())]
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lens)
        types = None
        if any(request.token_type_ids is not None for request in requests):
            types = np.concatenate([_types(request) for request in requests])

        def upload(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array.astype(np.int64))
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return cls(
            token_ids=upload(ids),
            ids=ids,
            positions=upload(positions),
            token_types=None if types is None else upload(types),
            row_of=upload(np.repeat(np.arange(len(lens)), lens)),
            starts=starts,
        )

    @property
    def lens(self) -> list[int]:
        """[R] tokens of each row."""
        return [end - start for start, end in itertools.pairwise(self.starts)]

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.starts) - 1


def _types(request: PoolingRequest) -> np.ndarray:
    if request.token_type_ids is None:
        return np.zeros(len(request.prompt_token_ids), dtype=np.int64)
    return np.asarray(request.token_type_ids)
