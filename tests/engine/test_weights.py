"""Weights arrive once each, equal from every format, and never through code that a file brings along."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.weights import load_weights

TinyModel = Callable[..., Path]
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A llama's folder that the test may change."""
    return Path(shutil.copytree(tiny_model("llama", num_hidden_layers=2), tmp_path / "model"))


def load_all(folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, torch.Tensor]:
    """All weights by name; a name that comes twice fails the test."""
    load_format = settings.pop("load_format", "auto")
    files = ModelFiles.open(str(folder), load_format=load_format, **settings)
    config = files.model_config()
    pairs = list(load_weights(files, config, dtype=dtype, device=CPU, load_format=load_format, seed=0))
    weights = dict(pairs)
    assert len(weights) == len(pairs)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == config.parameter_shapes()
    assert all(weight.dtype == dtype for weight in weights.values())
    return weights


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_weights_are_those_of_transformers(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    assert_equal(load_all(path), dict(AutoModelForCausalLM.from_pretrained(path).state_dict()))


def test_shards_hold_the_same_as_one_file(folder: Path) -> None:
    single = load_all(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(ModelFiles.open(str(folder)).weight_files) > 3
    assert_equal(load_all(folder), single)


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "bare-pickle"])
def test_torchs_files_hold_the_same_as_safetensors(legacy: bool, folder: Path) -> None:
    expected = load_all(folder)
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    for index, part in enumerate((names[:7], names[7:])):
        path = folder / f"pytorch_model-0000{index + 1}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, path, _use_new_zipfile_serialization=not legacy)
    assert_equal(load_all(folder, load_format="pt"), expected)


def test_weights_are_converted_to_the_dtype_asked_for(folder: Path) -> None:
    expected = {name: weight.bfloat16() for name, weight in load_all(folder).items()}
    assert_equal(load_all(folder, dtype=torch.bfloat16), expected)


def test_a_tied_head_and_old_buffers_are_left_out(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}, folder / WEIGHTS)
    found = load_all(folder, hf_overrides={"tie_word_embeddings": True})
    assert found.keys() == weights.keys() - {"lm_head.weight"}


class RunsCode:
    """What an attacker pickles: unpickling it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "bare-pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(legacy: bool, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "code-has-run"
    state: dict[str, Any] = {**load_file(folder / WEIGHTS), "model.norm.weight": RunsCode(target)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"pytorch_model.bin' holds pickled objects other than tensors, .*refused"):
        load_all(folder, load_format="pt")
    assert not target.exists()


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": {"model.norm.weight": torch.zeros(96)}}])
def test_a_torch_file_of_another_layout_is_refused(content: Any, folder: Path) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin' does not hold just named tensors"):
        load_all(folder, load_format="pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "bare-pickle"])
def test_a_torch_file_cut_short_is_refused(legacy: bool, folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / WEIGHTS), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"pytorch_model.bin' is damaged"):
        load_all(folder, load_format="pt")


def test_a_safetensors_file_cut_short_is_refused_without_the_check_too(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged"):
        load_all(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.norm.weight": None}, r"lacks 1 parameters \(model.norm.weight\)"),
        ({"model.norm.bias": torch.zeros(96)}, r"'model.norm.bias' of model=.* is unknown to LlamaForCausalLM"),
        ({"model.norm.weight": torch.zeros(95)}, r"'model.norm.weight' .*float32 \[95\], but its config says \[96\]"),
        ({"model.norm.weight": torch.zeros(96, dtype=torch.int8)}, r"'model.norm.weight' .* is torch.int8 \[96\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(changes: dict[str, Any], message: str, folder: Path) -> None:
    weights = {**load_file(folder / WEIGHTS), **changes}
    torch.save({name: weight for name, weight in weights.items() if weight is not None}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load_all(folder, load_format="pt")


def draw(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    files = ModelFiles(Path("none"), "folder", {}, {}, ())
    return dict(load_weights(files, config, dtype=dtype, device=CPU, load_format="dummy", seed=seed))


@pytest.fixture
def qwen3(tiny_model: TinyModel) -> ModelConfig:
    """A config with norms of all kinds and biases."""
    overrides = {"attention_bias": True}
    return ModelFiles.open(str(tiny_model("qwen3")), load_format="dummy", hf_overrides=overrides).model_config()


def test_dummy_weights_are_the_same_for_the_same_seed(qwen3: ModelConfig) -> None:
    assert_equal(draw(qwen3), draw(qwen3))
    assert not torch.equal(draw(qwen3)["lm_head.weight"], draw(qwen3, seed=1)["lm_head.weight"])


def test_dummy_weights_belong_to_their_name_alone(qwen3: ModelConfig) -> None:
    shapes = qwen3.parameter_shapes()
    fewer = draw(ModelConfig(**{**vars(qwen3), "num_layers": 1, "sliding_windows": (None,)}))
    assert_equal(fewer, {name: weight for name, weight in draw(qwen3).items() if name in fewer})
    assert len(fewer) < len(shapes)
    state = torch.get_rng_state()
    draw(qwen3)
    assert torch.equal(torch.get_rng_state(), state)


def test_dummy_weights_are_normal_and_never_constant(qwen3: ModelConfig) -> None:
    weights = draw(qwen3)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == qwen3.parameter_shapes()
    for name, weight in weights.items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        assert len(set(weight.flatten().tolist())) > weight.numel() // 2, name
        tolerance = 5 * qwen3.initializer_range / weight.numel() ** 0.5
        assert abs(weight.mean().item() - mean) < tolerance, name
        assert abs(weight.std().item() - qwen3.initializer_range) < tolerance, name
    shared = [weights[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert not torch.equal(shared[0], shared[1]) and not torch.equal(shared[1], shared[2])


def test_dummy_weights_are_the_float32_ones_rounded(qwen3: ModelConfig) -> None:
    rounded = {name: weight.bfloat16() for name, weight in draw(qwen3).items()}
    assert_equal(draw(qwen3, dtype=torch.bfloat16), rounded)


@pytest.mark.gpu
def test_dummy_weights_are_drawn_on_the_gpu(qwen3: ModelConfig) -> None:
    files, device = ModelFiles(Path("none"), "folder", {}, {}, ()), torch.device("cuda")
    first = dict(load_weights(files, qwen3, dtype=torch.bfloat16, device=device, load_format="dummy", seed=3))
    again = dict(load_weights(files, qwen3, dtype=torch.bfloat16, device=device, load_format="dummy", seed=3))
    assert all(weight.is_cuda and weight.dtype == torch.bfloat16 for weight in first.values())
    assert_equal(first, again)
