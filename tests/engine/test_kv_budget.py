"""How much memory a container still gives, and sizes that have no room in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydata_llm.engine import kv_budget
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.kv_budget import container_room
from raydata_llm.engine.pooling_engine import PoolingEngine


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"max": "max\n", "current": "900\n"}, None),
        ({"current": "900\n"}, None),
        ({"max": "1000\n", "current": "900\n"}, 100),
        (
            {"max": "1000\n", "current": "900\n", "stat": "anon 200\nfile 700\ninactive_file 600\nactive_file 100\n"},
            700,
        ),
    ],
)
def test_files_that_a_container_has_read_leave_room(files: dict[str, str], room: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert container_room(tmp_path) == room


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("max_model_len=2147483647", {"hf_overrides": {"max_position_embeddings": 2**31 - 1}}),
        ("max_model_len=1000000000", {"hf_overrides": {"max_position_embeddings": 10**9}, "max_model_len": 10**9}),
        ("max_num_seqs=1048576", {"hf_overrides": {"max_position_embeddings": 10**6}, "max_num_seqs": 2**20}),
        ("the weights of this LlamaForCausalLM take", {"hf_overrides": {"vocab_size": 2**30}, "load_format": "dummy"}),
    ],
)
def test_sizes_without_room_are_refused_before_memory_is_taken(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, named: str, settings: dict[str, Any]
) -> None:
    model = str(tiny_model("llama"))
    # Large, and the same on all machines.
    monkeypatch.setattr(kv_budget, "_free_host_memory", lambda: 16 << 30)
    monkeypatch.setattr(torch, "arange", no_tensor)
    monkeypatch.setattr(torch, "empty", no_tensor)
    with pytest.raises(ValueError, match=named) as told:
        Engine(EngineConfig(model=model, device="cpu", **settings))
    assert "16.0 GiB free" in str(told.value)


def no_tensor(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a tensor was made first")


def test_a_pooling_models_positions_without_room_are_refused(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_budget, "_free_host_memory", lambda: 16 << 30)
    config = EngineConfig(
        model=str(tiny_model("qwen3")),
        runner="pooling",
        convert="embed",
        device="cpu",
        hf_overrides={"max_position_embeddings": 2**31 - 1},
    )
    with pytest.raises(ValueError, match=r"max_model_len=2147483647 .the model's max_position_embeddings"):
        PoolingEngine(config)
