"""On a GPU, rows with adapters of all forms equal merged models, with CUDA graphs and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from tests.engine.peft_forms import FORMS
from tests.engine.test_lora_forms import LORA, Merged, check, run

pytestmark = pytest.mark.gpu

WAYS: dict[str, dict[str, Any]] = {
    "graphs": {"max_loras": len(FORMS)},
    "graphs, few slots": {"max_loras": 3, "max_num_seqs": 16},
    "eager": {"max_loras": 5, "enforce_eager": True},
    "batch-invariant": {"max_loras": 4, "batch_invariant": True, "max_num_seqs": 16},
}


@pytest.fixture(scope="module")
def merged(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    # A head's size that all kernels take.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return Merged(tiny_model("qwen2", **sizes), tmp_path_factory.mktemp("forms"), FORMS)


@pytest.mark.parametrize("way", WAYS)
def test_rows_with_adapters_of_all_forms_equal_merged_models(way: str, merged: Merged) -> None:
    names = list(merged.adapters)
    settings = {"num_gpu_blocks_override": 400, "max_num_seqs": 64, **LORA, **WAYS[way]}
    engine = Engine(EngineConfig(model=str(merged.path), dtype="float32", device="cuda", **settings))
    try:
        check(run(engine, merged.requests(names, logprobs=2, prompt_logprobs=2)), merged, names, within=5e-3)
        check(run(engine, merged.requests(names)), merged, names)
    finally:
        engine.shutdown()
