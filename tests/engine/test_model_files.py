"""ModelFiles finds a model's files and tells everything that is wrong with them before any tensor is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raydata_llm.engine.model_files import ModelFiles, override_config
from raydata_llm.engine.sampling_params import SamplingParams

TinyModel = Callable[..., Path]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A llama's folder that the test may spoil."""
    return Path(shutil.copytree(tiny_model("llama", num_hidden_layers=2), tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def check(folder: Path, **settings: Any) -> None:
    files = ModelFiles.open(str(folder), **settings)
    files.check_weights(files.model_config())


def shard(folder: Path) -> list[Path]:
    """Save the folder's model again in shards of at most 100 kB."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_complete_folder_passes(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    files = ModelFiles.open(str(path))
    assert files.kind == "folder" and files.path == path
    assert files.weight_files == (path / WEIGHTS,)
    files.check_weights(files.model_config())


def test_shards_are_found_through_the_index_and_pass(folder: Path) -> None:
    shards = shard(folder)
    assert len(shards) > 3
    files = ModelFiles.open(str(folder))
    assert files.weight_files == tuple(shards)
    files.check_weights(files.model_config())


def test_pickled_weights_are_taken_when_asked_for_or_alone(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    assert ModelFiles.open(str(folder)).weight_files == (folder / WEIGHTS,)
    assert ModelFiles.open(str(folder), load_format="pt").weight_files == (folder / "pytorch_model.bin",)
    (folder / WEIGHTS).unlink()
    assert ModelFiles.open(str(folder)).weight_files == (folder / "pytorch_model.bin",)
    check(folder)


def test_dummy_weights_need_no_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    files = ModelFiles.open(str(folder), load_format="dummy")
    assert files.weight_files == ()
    files.check_weights(files.model_config())


def test_harmless_extras_are_tolerated(folder: Path) -> None:
    change_json(folder / "config.json", tie_word_embeddings=True)

    def add_buffers(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)

    change_weights(folder, add_buffers)
    check(folder)


def test_a_config_without_dtype_takes_that_of_the_weights(folder: Path) -> None:
    change_json(folder / "config.json", dtype=None)

    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: weight.bfloat16() for name, weight in weights.items()})

    change_weights(folder, halve)
    assert ModelFiles.open(str(folder)).model_config().dtype == "bfloat16"


def drop_norm(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def drop_layer(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        del weights[name]


def rename_head(weights: dict[str, torch.Tensor]) -> None:
    weights["head.weight"] = weights.pop("lm_head.weight")


def narrow_down(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(96, 175)


def quantise(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_norm, r"do not fit its config \(LlamaForCausalLM\): missing: model.norm.weight. Give the folder"),
        (drop_layer, r"missing: model.layers.1.self_attn.q_proj.weight, .* and 6 more"),
        (rename_head, r"missing: lm_head.weight; unknown: head.weight"),
        (narrow_down, r"of another shape: model.layers.0.mlp.down_proj.weight is \[96, 175\], not \[96, 176\]"),
        (quantise, r"of a dtype that is not run .*model.layers.1.mlp.up_proj.weight is F8_E4M3"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[Any], None], message: str, folder: Path) -> None:
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        check(folder)


def test_a_config_of_another_size_is_noticed(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj.weight is \[48, 96\], not \[72, 96\]"):
        check(folder, hf_overrides={"num_key_value_heads": 3})


def test_a_safetensors_file_cut_short_anywhere_is_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 5, 8, 100, 3000, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors' is damaged or not a safetensors file: .*again"):
            check(folder)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"not json", "its header is not JSON"),
        (b"[1, 2]  ", "its header is a list"),
        (b'{"a": {"dtype": "F32"}}', "the header of a is garbled"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0]}}', "the header of a is garbled"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', r"a has 8 bytes for F32 of shape \(3,\)"),
    ],
)
def test_a_garbled_header_is_refused(header: bytes, message: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=message):
        check(folder)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    shards = shard(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"names files that are not there: {shards[1].name}; download them"):
        ModelFiles.open(str(folder))


def test_a_shard_that_is_cut_short_is_named(folder: Path) -> None:
    last = shard(folder)[-1]
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{last.name}' is damaged.*ends 10 bytes past the end of the file"):
        check(folder)


def test_a_parameter_in_two_shards_is_named(folder: Path) -> None:
    shards = shard(folder)
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file({**second, name: first[name]}, shards[1])
    with pytest.raises(ValueError, match=rf"{name} of model=.* is in two weight files"):
        check(folder)


def test_an_index_without_a_map_is_refused(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        ModelFiles.open(str(folder))


def test_a_torch_file_cut_short_is_refused(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / WEIGHTS), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pytorch_model.bin' is damaged or not torch's"):
        check(folder, load_format="pt")


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model='nowhere/at-all' does not exist: give a folder"):
        ModelFiles.open("nowhere/at-all")
    with pytest.raises(ValueError, match=r"is a file, but not a .gguf"):
        ModelFiles.open(str(folder / WEIGHTS))
    with pytest.raises(ValueError, match="load_format='gguf' does not fit the folder"):
        ModelFiles.open(str(folder), load_format="gguf")
    with pytest.raises(ValueError, match=r"has no weights \(pytorch_model\*.bin\).*load_format='dummy'"):
        ModelFiles.open(str(folder), load_format="pt")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no weights \(model\*.safetensors or pytorch_model\*.bin\)"):
        ModelFiles.open(str(folder))
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json' is not valid JSON"):
        ModelFiles.open(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json' holds a list, not an object"):
        ModelFiles.open(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json: give the folder of a Hugging Face model"):
        ModelFiles.open(str(folder))
    (folder / "some.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no config.json: name the file itself: .*some.gguf"):
        ModelFiles.open(str(folder))


def test_generation_config_becomes_sampling_params(folder: Path) -> None:
    values = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 77,
        "max_length": 4096,
        "do_sample": True,
        "transformers_version": "5.0.0",
    }
    (folder / "generation_config.json").write_text(json.dumps(values))
    defaults = ModelFiles.open(str(folder)).default_sampling_params({})
    assert defaults == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 77,
    }
    params = SamplingParams.from_mapping({"top_k": 5}, defaults)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 5, 77)


def test_do_sample_false_means_greedy_and_absent_means_nothing(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text('{"do_sample": false, "temperature": 0.6}')
    files = ModelFiles.open(str(folder))
    assert files.default_sampling_params({}) == {"temperature": 0.0}
    assert files.default_sampling_params({"temperature": 0.3, "top_k": 4}) == {"temperature": 0.3, "top_k": 4}
    assert files.default_sampling_params({"max_new_tokens": 9}) == {"temperature": 0.0, "max_tokens": 9}
    assert files.default_sampling_params({"top_p": 0.5}, with_own=False) == {"top_p": 0.5}
    path.write_text('{"eos_token_id": 2}')
    assert ModelFiles.open(str(folder)).default_sampling_params({}) == {}
    path.unlink()
    assert ModelFiles.open(str(folder)).default_sampling_params({}) == {}


@pytest.mark.parametrize(
    "config_eos, generation_eos, expected",
    [(2, [5, 2, 7], (2, 5, 7)), ([2, 3], 3, (2, 3)), (None, 9, (9,)), (2, None, (2,)), (None, None, ())],
)
def test_end_tokens_are_those_of_both_configs(
    config_eos: Any, generation_eos: Any, expected: tuple[int, ...], folder: Path
) -> None:
    change_json(folder / "config.json", eos_token_id=config_eos)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    files = ModelFiles.open(str(folder))
    assert files.eos_token_ids(files.model_config()) == expected


def test_overrides_replace_values_in_either_style() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16", "hidden_size": 8}
    old = {"rope_scaling": None, "rope_theta": 5e5, "torch_dtype": "bfloat16", "hidden_size": 8}
    linear = {"rope_type": "linear", "factor": 2.0}
    for config in (new, old):
        assert override_config(config, {}) == config
        for name in ("rope_parameters", "rope_scaling"):
            merged = override_config(config, {name: linear, "torch_dtype": "float32", "hidden_size": 16})
            assert {key: merged.get(key) for key in ("rope_parameters", "rope_scaling") if merged.get(key)} == {
                name: linear
            }
            assert merged["rope_theta"] == 5e5 and merged["hidden_size"] == 16
            assert merged["torch_dtype"] == "float32" and "dtype" not in merged
        changed = override_config(config, {"rope_theta": 7.0})
        assert changed["rope_theta"] == 7.0 and "rope_theta" not in (changed.get("rope_parameters") or {})


def test_overrides_reach_the_model_config(folder: Path) -> None:
    overrides = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}
    config = ModelFiles.open(str(folder), hf_overrides={**overrides, "eos_token_id": [3, 4]}).model_config()
    assert (config.rope.rope_type, config.rope.theta, config.context_length) == ("yarn", 10000.0, 4096)
    assert config.eos_token_ids == (3, 4)
