"""Uploads arrive whole, and those beside the current stream do not wait for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from raydata_llm.engine.upload import UploadBeside, upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_of_all_kinds_go_in_one_upload(device: str) -> None:
    arrays: list[npt.NDArray[Any]] = [
        np.arange(5, dtype=np.int32),
        np.arange(3),
        np.array([0.5, -1.0], dtype=np.float32),
    ]
    for array, there in zip(arrays, upload(torch.device(device), *arrays), strict=True):
        assert there.device.type == device
        assert there.cpu().numpy().dtype == array.dtype
        assert there.tolist() == array.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_uploaded_beside_is_whole_each_time(device: str) -> None:
    beside = UploadBeside(torch.device(device))
    host = torch.empty((64, 4096), dtype=torch.int32, pin_memory=device == "cuda")
    for number in range(6):
        host[: 64 - number] = number
        there = beside(host[: 64 - number])
        # The next one is not to overwrite this.
        total = there.long().sum()
        del there
        assert total.item() == number * (64 - number) * 4096


@pytest.mark.gpu
def test_an_upload_beside_does_not_wait_for_the_current_stream() -> None:
    beside = UploadBeside(torch.device("cuda"))
    host = torch.arange(1 << 20, dtype=torch.int32).pin_memory()
    beside(host)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)
    slept = torch.cuda.current_stream().record_event()
    there = beside(host)
    assert beside.stream is not None
    beside.stream.synchronize()
    assert not slept.query(), "the copy was to be done while the current stream was busy"
    assert torch.equal(there.cpu(), host)
    assert slept.query(), "what comes after the copy was to be in the current stream's order"
