"""Which adapters stay on the host."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydata_llm.engine import adapter_cache
from raydata_llm.engine.adapter import Adapter, ModuleChange
from raydata_llm.engine.adapter_cache import AdapterCache

CONFIG: Any = "a model's"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were read; each adapter takes 4,000 bytes."""
    folders: list[str] = []

    def reading(folder: Path, config: Any, *, max_rank: int) -> Adapter:
        folders.append(folder.name)
        return Adapter(changes={"lm_head": ModuleChange(weight=torch.zeros(1000))})

    monkeypatch.setattr(adapter_cache, "read_adapter", reading)
    return folders


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], str]:
    def made(name: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
        return str(tmp_path / name)

    return made


@pytest.mark.parametrize("limits", [(2, 10**9), (100, 8000)], ids=["by number", "by bytes"])
def test_the_adapter_that_was_used_last_is_kept(
    limits: tuple[int, int], read: list[str], folder_of: Callable[[str], str]
) -> None:
    cache = AdapterCache(*limits)
    a, b, c = (folder_of(name) for name in "abc")
    for path in (a, b, a, c, a, b):
        cache.load(path, CONFIG, 8)
    assert read == ["a", "b", "c", "b"]


def test_one_that_is_larger_than_all_room_is_kept_until_the_next(
    read: list[str], folder_of: Callable[[str], str]
) -> None:
    cache = AdapterCache(10, 100)
    a, b = folder_of("a"), folder_of("b")
    for path in (a, a, b, a):
        cache.load(path, CONFIG, 8)
    assert read == ["a", "b", "a"]


def test_one_whose_folder_vanished_is_taken_as_it_was(read: list[str], folder_of: Callable[[str], str]) -> None:
    cache, path = AdapterCache(), folder_of("a")
    adapter = cache.load(path, CONFIG, 8)
    shutil.rmtree(path)
    assert cache.kept(path, CONFIG, 8) is adapter and read == ["a"]
