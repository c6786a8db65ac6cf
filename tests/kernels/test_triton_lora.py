"""The Triton kernels of LoRA additions, against plain products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.test_lora import SLOTS, affine_of, draw, plainly, tiles_on

Close = Callable[..., None]


@pytest.mark.parametrize("slots", SLOTS, ids=["few", "two tiles", "none"])
@pytest.mark.parametrize(("width", "rank", "parts"), [(40, 6, (24,)), (300, 16, (130, 8, 8)), (128, 3, (33, 33))])
def test_rows_get_the_addition_of_their_adapter(
    slots: list[int],
    width: int,
    rank: int,
    parts: tuple[int, ...],
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    close: Close,
) -> None:
    from raydata_llm.kernels.lora_triton import launch_add_lora

    make = {"dtype": triton_dtype, "device": triton_device}
    x, y = draw(len(slots), width, seed=0, **make), draw(len(slots), sum(parts), seed=1, **make)  # type: ignore[arg-type]
    a = draw(3, len(parts) * rank, width, seed=2, **make)  # type: ignore[arg-type]
    b = draw(3, sum(parts), rank, seed=3, **make)  # type: ignore[arg-type]
    affine = affine_of(3, sum(parts), triton_device)
    wanted = plainly(y, x, a, b, affine, slots, parts).to(triton_dtype)
    launch_add_lora(y, x, a, b, affine, tiles_on(triton_device, slots, padding=2), parts)
    close(y, wanted)
