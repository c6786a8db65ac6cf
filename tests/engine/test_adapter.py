"""LoRA adapters' files: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raydata_llm.engine.adapter import FUSED_PARTS, read_adapter
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


@pytest.mark.parametrize("fused", FUSED_PARTS)
@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_the_parts_of_a_fused_linear_stand_in_their_places(
    fused: str, rslora: bool, scale: float, config: ModelConfig, tmp_path: Path
) -> None:
    parts = FUSED_PARTS[fused]
    given = [parts[0], parts[-1]]  # of q, k and v the one in the middle is left out
    tensors = {name: t for part in given for name, t in pair(config, 1, part, seed=len(part)).items()}
    adapter = read_adapter(write(tmp_path / "a", tensors, use_rslora=rslora), config, max_rank=8)
    assert adapter.layers[0] == {} and list(adapter.layers[1]) == [fused]
    a, b = adapter.layers[1][fused]
    first = 0
    for number, part in enumerate(parts):
        outputs = config.parameter_shapes()[f"model.layers.1.{part}.weight"][0]
        change = b[first : first + outputs] @ a[number * RANK : (number + 1) * RANK]
        name = f"base_model.model.model.layers.1.{part}"
        if part in given:
            wanted = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            torch.testing.assert_close(change, wanted)
        else:
            assert not change.any()
        first += outputs
    assert first == len(b)


def test_what_is_not_computed_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    good = pair(config, 0, "mlp.down_proj")
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(RANK, 4)}
    short = {name: t for name, t in good.items() if "lora_A" in name}
    wide = {name: torch.zeros(len(t), t.shape[1] + 1) if "lora_A" in name else t for name, t in good.items()}
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
        (good, {"use_dora": True}, "use_dora=True"),
        (good, {"bias": "all"}, "bias='all'"),
        (good, {"r": 9}, "max_lora_rank=8"),
        (good, {"r": 1}, "no pair of rank 1"),
        (good, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (good | head, {}, "lm_head"),
        (short, {}, "no pair"),
        (wide, {}, "another model"),
    ]
    for number, (tensors, settings, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            read_adapter(write(tmp_path / str(number), tensors, **settings), config, max_rank=8)
    with pytest.raises(ValueError, match=r"is no adapter: adapter_config\.json"):
        read_adapter(tmp_path, config, max_rank=8)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_damaged_file_is_the_adapters_error(name: str, config: ModelConfig, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {})
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(b"\x10" + bytes(7) + b"cut short")
    with pytest.raises(ValueError, match=f"is damaged: {name} cannot be read"):
        read_adapter(folder, config, max_rank=8)


def test_an_alpha_of_text_is_the_adapters_error(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_alpha='6'"):
        read_adapter(write(tmp_path / "a", {}, lora_alpha="6"), config, max_rank=8)
