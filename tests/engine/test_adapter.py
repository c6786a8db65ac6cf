"""LoRA adapters' files: what is read, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raydata_llm.engine.adapter import read_adapter
from raydata_llm.engine.adapter_config import AdapterConfig
from raydata_llm.engine.model_config import ModelConfig
from tests.engine.tiny_shape import write_tiny_shape

RANK = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_tiny_shape(tmp_path_factory.mktemp("model"))
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 6} | settings)
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(config: ModelConfig, layer: int, part: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = config.parameter_shapes()[f"model.layers.{layer}.{part}.weight"]
    name = f"base_model.model.model.layers.{layer}.{part}"
    return {
        f"{name}.lora_A.weight": torch.randn(RANK, inputs, generator=generator),
        f"{name}.lora_B.weight": torch.randn(outputs, RANK, generator=generator),
    }


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_b_is_scaled_and_the_rest_as_it_stands(rslora: bool, scale: float, config: ModelConfig, tmp_path: Path) -> None:
    tensors = pair(config, 1, "self_attn.k_proj") | pair(config, 0, "mlp.up_proj", seed=1)
    adapter = read_adapter(write(tmp_path / "a", tensors, use_rslora=rslora), config, max_rank=8)
    assert set(adapter.changes) == {"model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"}
    for module, change in adapter.changes.items():
        assert change.a is not None and change.b is not None and not change.is_affine
        assert torch.equal(change.a, tensors[f"base_model.model.{module}.lora_A.weight"])
        torch.testing.assert_close(change.b, scale * tensors[f"base_model.model.{module}.lora_B.weight"])


def test_patterns_are_matched_from_the_end_of_a_name_and_the_first_one_counts(tmp_path: Path) -> None:
    settings = {
        **{"r": 4, "lora_alpha": 8, "alpha_pattern": {"k_proj": 3}},
        "rank_pattern": {"q_proj": 2, r".*\.1\.self_attn\.q_proj": 9, "^model.layers.0.mlp.up_proj": 1, "_proj": 9},
    }
    config = AdapterConfig.read(write(tmp_path / "a", {}, **settings))
    ranks = {"model.layers.1.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 1, "model.layers.1.mlp.up_proj": 4}
    assert {module: config.rank_of(module) for module in ranks} == ranks
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 4
    assert config.scale_of("model.layers.0.self_attn.k_proj") == 0.75


def test_what_a_file_leaves_out_is_as_peft_has_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    config = AdapterConfig.read(tmp_path)
    assert (config.rank, config.alpha, config.use_dora) == (8, 8, False)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 0}')
    assert AdapterConfig.read(tmp_path).scale_of("lm_head") == 0


def test_what_is_not_computed_is_refused_by_name(config: ModelConfig, tmp_path: Path) -> None:
    good = pair(config, 0, "mlp.down_proj")
    down = "base_model.model.model.layers.0.mlp.down_proj"
    short = {name: t for name, t in good.items() if "lora_A" in name}
    wide = {name: torch.zeros(len(t), t.shape[1] + 1) if "lora_A" in name else t for name, t in good.items()}
    hidden, vocab = config.hidden_size, config.vocab_size
    head, embedding = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
    merge = "merge_and_unload"
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
        (good, {"peft_type": "LOHA"}, f"peft_type='LOHA'.*{merge}"),
        (good, {"bias": "some"}, "bias='some'"),
        (good, {"layer_replication": [[0, 1]]}, f"layer_replication=.*{merge}"),
        (good, {"target_parameters": ["experts"]}, f"target_parameters=.*{merge}"),
        (good, {"alora_invocation_tokens": [1]}, f"alora_invocation_tokens=.*{merge}"),
        (good, {"trainable_token_indices": [1]}, f"trainable_token_indices=.*{merge}"),
        (good, {"use_qalora": True}, f"use_qalora=.*{merge}"),
        (good, {"of_next_year": 1}, f"of_next_year=1.*{merge}"),
        (good, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=.*path_initial_model_for_weight_conversion"),
        (good, {"lora_bias": True, "use_dora": True}, f"lora_bias=.*{merge}"),
        (good, {"r": 9}, "has rank 9 for .*, above max_lora_rank=8"),
        (good, {"rank_pattern": {"down_proj": 9}}, "has rank 9 for .*, above max_lora_rank=8"),
        (good, {"r": 1}, "no pair of rank 1"),
        (good, {"r": 0}, "r=0"),
        (good, {"rank_pattern": {"down_proj": True}}, "down_proj=True"),
        (good, {"rank_pattern": ["down_proj"]}, "rank_pattern="),
        (good, {"alpha_pattern": {"down_proj": float("nan")}}, "down_proj=nan"),
        (good, {"alpha_pattern": {"(": 1}}, r"alpha_pattern='\('.*no regular expression"),
        (good, {"modules_to_save": ["lm_head"]}, "modules_to_save with 'lm_head', but no such tensor"),
        (good, {"use_dora": True}, "use_dora=True, which .*down_proj does not fit"),
        (good | {f"{down}.lora_magnitude_vector": torch.ones(hidden)}, {}, "use_dora=False, which"),
        (good | {f"{head}.lora_A.weight": torch.zeros(RANK, hidden)}, {}, "no pair of rank 2 for lm_head"),
        (good | {f"{head}.weight": torch.zeros(vocab + 8, hidden)}, {}, f"another vocabulary .*{merge}"),
        (
            good | {f"{embedding}.base_layer.weight": torch.zeros(vocab - 1, hidden)},
            {},
            f"another vocabulary .*{merge}",
        ),
        (good | {f"{embedding}.token_adapter.trainable_tokens_delta": torch.zeros(1, hidden)}, {}, merge),
        (good | {f"{down}.bias": torch.zeros(hidden)}, {}, f"a bias for .*{merge}"),
        (good | {f"{down}.lora_B.bias": torch.zeros(hidden + 1)}, {}, "of another model"),
        (
            good | {f"{down}.base_layer.weight": torch.zeros(hidden, config.intermediate_size)},
            {},
            f"of another model|A, B and another weight.*{merge}",
        ),
        (
            {"base_model.model.model.layers.0.input_layernorm.lora_A.weight": torch.zeros(hidden, 2)},
            {},
            f"input_layernorm.*{merge}",
        ),
        ({"base_model.model.score.weight": torch.zeros(2, hidden)}, {}, f"changes score.*{merge}"),
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(RANK, hidden)}, {}, "layers.7"),
        ({"other.lora_A.weight": torch.zeros(RANK, hidden)}, {}, f"has a tensor other.*{merge}"),
        ({name: t.long() for name, t in good.items()}, {}, "is damaged: .* is torch.int64"),
        (short, {}, "no pair"),
        (wide, {}, "another model"),
    ]
    for number, (tensors, settings, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message) as error:
            read_adapter(write(tmp_path / str(number), tensors, **settings), config, max_rank=8)
        assert "\n" not in str(error.value) and str(tmp_path / str(number)) in str(error.value)
    with pytest.raises(ValueError, match=r"is no adapter: adapter_config\.json"):
        read_adapter(tmp_path, config, max_rank=8)


def test_settings_of_training_and_those_that_are_off_change_nothing(config: ModelConfig, tmp_path: Path) -> None:
    tensors = pair(config, 0, "mlp.down_proj")
    idle: dict[str, Any] = {
        **{
            "lora_dropout": 0.1,
            "target_modules": "all-linear",
            "exclude_modules": ["lm_head"],
            "task_type": "CAUSAL_LM",
        },
        **{
            "layers_to_transform": [0],
            "init_lora_weights": "gaussian",
            "megatron_core": "megatron.core",
            "bias": "all",
        },
        **{"qalora_group_size": 16, "layer_replication": None, "arrow_config": None, "use_qalora": False},
        **{"auto_mapping": {"unsloth_fixed": True}, "fan_in_fan_out": True, "of_next_year": None, "loftq_config": {}},
        **{"modules_to_save": ["classifier"]},
    }
    assert read_adapter(write(tmp_path / "a", tensors, **idle), config, max_rank=8).num_bytes > 0


def test_a_file_that_is_written_anew_does_not_change_what_was_read(config: ModelConfig, tmp_path: Path) -> None:
    weight = torch.randn(config.vocab_size, config.hidden_size)
    folder = write(tmp_path / "a", {"base_model.model.lm_head.weight": weight}, modules_to_save=["lm_head"])
    change = read_adapter(folder, config, max_rank=8).changes["lm_head"]
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert change.weight is not None and torch.equal(change.weight, weight)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_damaged_file_is_the_adapters_error(name: str, config: ModelConfig, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {})
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(b"\x10" + bytes(7) + b"cut short")
    with pytest.raises(ValueError, match=f"is damaged: {name} cannot be read"):
        read_adapter(folder, config, max_rank=8)


def test_a_pipe_or_a_folder_in_the_place_of_the_settings_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match=r"is no adapter: .* is a pipe"):
        read_adapter(tmp_path, config, max_rank=8)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(ValueError, match=r"is no adapter: .* is a folder"):
        read_adapter(tmp_path, config, max_rank=8)


@pytest.mark.parametrize(
    "text",
    ['{"r": 1' + 400 * "0" + "}", '{"lora_alpha": 1' + 400 * "0" + "}", '{"r": ' + 9999 * "[" + 9999 * "]" + "}"],
)
def test_numbers_and_depths_without_bound_are_the_adapters_error(
    text: str, config: ModelConfig, tmp_path: Path
) -> None:
    head = {"base_model.model.lm_head.weight": torch.zeros(config.vocab_size, config.hidden_size)}
    (write(tmp_path / "a", head) / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter") as error:
        read_adapter(tmp_path / "a", config, max_rank=8)
    assert len(str(error.value)) < 600 + len(str(tmp_path))


def test_an_alpha_of_text_is_the_adapters_error(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_alpha='6'"):
        read_adapter(write(tmp_path / "a", {}, lora_alpha="6"), config, max_rank=8)
