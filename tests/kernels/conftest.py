"""Where the Triton kernels are tested: on a GPU, or under Triton's interpreter in a process started for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter's bfloat16 arithmetic is wrong, so there it is float16 that rounds; on a GPU both 16-bit types do.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
# Of outputs that are rounded once, in units of the last place.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `triton_device` run where this process can launch kernels."""
    if "triton_device" in metafunc.fixturenames:
        parameter = "cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("triton_device", [parameter], ids=["interpreted" if INTERPRETED else "gpu"], indirect=True)
    if "triton_dtype" in metafunc.fixturenames:
        metafunc.parametrize("triton_dtype", DTYPES, ids=str)


@pytest.fixture
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device to launch on. Memory that a launcher allocates comes as NaN, so that what no program writes shows."""
    pytest.importorskip("triton")
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield torch.device(request.param)


@pytest.fixture
def close(triton_device: torch.device) -> Callable[..., None]:
    """`close(result, expected)`: equal within what the result's dtype can hold, NaN nowhere."""

    def check(result: torch.Tensor, expected: torch.Tensor, **kwargs: Any) -> None:
        tolerance = TOLERANCE[result.dtype]
        torch.testing.assert_close(result.cpu(), expected.cpu().to(result.dtype), atol=tolerance, rtol=tolerance)

    return check


@pytest.fixture
def make_rows(triton_device: torch.device) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`make_rows(lengths, kv_heads, head_dim, block_size, dtype)`: caches of keys and values, and the block table."""
    return lambda *args: tuple(tensor.to(triton_device) for tensor in _make_rows(*args))


def _make_rows(
    lengths: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches in which only the rows' own tokens are numbers, all else NaN or infinite; unused columns out of range."""
    generator = torch.Generator().manual_seed(0)
    columns = -(-max(lengths) // block_size)
    num_blocks = len(lengths) * columns + 2
    order = torch.randperm(num_blocks, generator=generator)
    table = torch.full((len(lengths), columns), 2**31 - 1, dtype=torch.int32)
    caches = [
        torch.full((num_blocks, kv_heads, block_size, head_dim), poison) for poison in (float("nan"), float("inf"))
    ]
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        table[row, :used] = order[row * columns : row * columns + used]
        for cache in caches:
            keys = torch.randn((kv_heads, used * block_size, head_dim), generator=generator)
            keys[:, length:] = cache[0, 0, 0, 0]
            cache[table[row, :used].long()] = keys.view(kv_heads, used, block_size, head_dim).transpose(0, 1)
    return caches[0].to(dtype), caches[1].to(dtype), table


def _poison_(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: _poison_(allocate(*args, **kwargs))
