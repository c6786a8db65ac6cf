"""Embeddings equal what sentence-transformers makes of the same files: pooling, layers after it, normalised or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.pooling_engine import PoolingEngine
from raydata_llm.engine.pooling_model import PoolingModel
from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.engine.pooling_request import PoolingRequest
from tests.engine.tiny_pooling import (
    DENSE,
    IDENTITY,
    dense,
    draw_prompts,
    run_each,
    save_layer,
    save_modules,
    save_pooling_model,
)


def embed(engine: PoolingEngine, **params: Any) -> torch.Tensor:
    """Embeddings of `draw_prompts()`, one a row."""
    for index, prompt in enumerate(draw_prompts()):
        ids = np.array(prompt, dtype=np.int32)
        pooling = PoolingParams(**params)
        engine.add_request(PoolingRequest(request_id=str(index), prompt_token_ids=ids, pooling_params=pooling))
    outputs: dict[str, Any] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    values = [outputs[str(index)].outputs for index in range(len(outputs))]
    return torch.from_numpy(np.stack([one.data for one in values if one is not None]))


def open_engine(folder: Path, **settings: Any) -> PoolingEngine:
    return PoolingEngine(EngineConfig(model=str(folder), dtype="float32", **settings))


@pytest.fixture
def means(tmp_path: Path) -> torch.Tensor:
    """A BERT is saved in tmp_path; the mean of each prompt's hidden states."""
    model = save_pooling_model(tmp_path, "bert")
    return torch.stack([output.last_hidden_state[0].mean(0) for output in run_each(model, draw_prompts())])


def test_files_without_normalize_give_raw_embeddings(tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path)
    torch.testing.assert_close(embed(open_engine(tmp_path)), means, atol=1e-4, rtol=0)


def test_files_with_normalize_give_embeddings_of_length_1(tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path, ("Normalize", {}))
    torch.testing.assert_close(embed(open_engine(tmp_path)), F.normalize(means, dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", ["normalize", "use_activation"])
def test_an_explicit_setting_wins_over_the_files(setting: str, tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path)
    scaled = F.normalize(means, dim=-1)
    asked = embed(open_engine(tmp_path), **{setting: True})
    torch.testing.assert_close(asked, scaled, atol=1e-4, rtol=0)
    configured = open_engine(tmp_path, pooler_config={setting: True})
    torch.testing.assert_close(embed(configured), scaled, atol=1e-4, rtol=0)
    torch.testing.assert_close(embed(configured, **{setting: False}), means, atol=1e-4, rtol=0)


def test_a_model_without_modules_is_normalised_as_in_vllm(tmp_path: Path, means: torch.Tensor) -> None:
    engine = open_engine(tmp_path, pooler_config={"pooling_type": "MEAN"})
    torch.testing.assert_close(embed(engine), F.normalize(means, dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_dense_layer_is_applied_before_normalisation(pickled: bool, tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path, dense(), ("Normalize", {}))
    weight, bias = save_layer(tmp_path / "2_Dense", pickled=pickled)
    wanted = torch.tanh(F.linear(means, weight, bias))
    engine = open_engine(tmp_path)
    torch.testing.assert_close(embed(engine), F.normalize(wanted, dim=-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(embed(engine, normalize=False), wanted, atol=1e-4, rtol=0)


def test_layers_are_applied_in_the_files_order(tmp_path: Path, means: torch.Tensor) -> None:
    """Normalize in the middle, a dense layer without an activation, a norm, and a residual with its projection."""
    modules = [
        ("Normalize", {}),
        dense(activation=IDENTITY),
        ("LayerNorm", {"dimension": DENSE}),
        ("Dropout", {"dropout": 0.5}),
        dense(DENSE, 7, activation="torch.nn.modules.activation.GELU", use_residual=True),
    ]
    save_modules(tmp_path, *modules)
    weight, bias = save_layer(tmp_path / "3_Dense")
    norm = {"norm.weight": torch.linspace(0.5, 2, DENSE), "norm.bias": torch.linspace(-1, 1, DENSE)}
    save_file(norm, tmp_path / "4_LayerNorm" / "model.safetensors")
    last, last_bias = save_layer(tmp_path / "6_Dense", 7, DENSE)
    residual = torch.randn(7, DENSE, generator=torch.Generator().manual_seed(1))
    state = {"linear.weight": last, "linear.bias": last_bias, "residual.weight": residual}
    save_file(state, tmp_path / "6_Dense" / "model.safetensors")
    states = F.linear(F.normalize(means, dim=-1), weight, bias)
    states = F.layer_norm(states, (DENSE,), norm["norm.weight"], norm["norm.bias"])
    wanted = F.gelu(F.linear(states, last, last_bias)) + F.linear(states, residual)
    torch.testing.assert_close(embed(open_engine(tmp_path)), wanted, atol=1e-4, rtol=1e-4)


def test_dimensions_are_those_of_the_last_layer(tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path, dense())
    weight, bias = save_layer(tmp_path / "2_Dense")
    engine = open_engine(tmp_path, hf_overrides={"is_matryoshka": True})
    wanted = torch.tanh(F.linear(means, weight, bias))[:, :8]
    torch.testing.assert_close(embed(engine, dimensions=8), wanted, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=f"dimensions={DENSE + 1} is not valid: give {DENSE} or less"):
        embed(engine, dimensions=DENSE + 1)


def test_dummy_weights_need_no_layer_file(tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path, dense())
    assert embed(open_engine(tmp_path, load_format="dummy")).shape == (len(means), DENSE)


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"], "embedding_dimension": 48}, "mean"),
        ({"pooling_mode_cls_token": False}, "mean"),
    ],
)
def test_pooling_is_read_in_both_spellings(
    pooling: dict[str, Any], kind: str, tmp_path: Path, means: torch.Tensor
) -> None:
    save_modules(tmp_path, pooling=pooling)
    config = EngineConfig(model=str(tmp_path))
    assert PoolingModel.open(ModelFiles.open(str(tmp_path)), config).pooling == kind


FOREIGN_INPUT: dict[str, Any] = {"module_input_name": "token_embeddings"}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (("WeightedLayerPooling", {}), "has a WeightedLayerPooling: only models of"),
        (dense(activation="evil.Function"), r"2_Dense/config.json has activation_function='evil.Function': run are"),
        (dense(in_features=47), r"2_Dense/config.json of the model: its input has 47 values, but .* gives 48"),
        (dense(in_features=10**30), r"2_Dense/config.json has in_features=1000.*: it must be a whole number"),
        (dense(out_features=True), r"2_Dense/config.json has out_features=True: it must be a whole number"),
        (dense(bias="yes"), r"2_Dense/config.json has bias='yes': it must be true or false"),
        (dense(**FOREIGN_INPUT), r"has module_input_name='token_embeddings': only modules that turn"),
        (("Normalize", FOREIGN_INPUT), r"has module_input_name='token_embeddings': only modules that turn"),
        (dense(), r"2_Dense has no model.safetensors or pytorch_model.bin"),
    ],
)
def test_a_module_that_is_not_run_is_refused_by_name(
    module: Any, message: str, tmp_path: Path, means: torch.Tensor
) -> None:
    save_modules(tmp_path, module)
    with pytest.raises(ValueError, match=message):
        open_engine(tmp_path)


@pytest.mark.parametrize("content", ["{", "[7]", "{}", "[" * 5000, '[{"type": "m.Pooling", "path": "../x"}]'])
def test_a_damaged_list_of_modules_is_one_error(content: str, tmp_path: Path, means: torch.Tensor) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json"):
        open_engine(tmp_path)


def test_a_layer_file_of_another_shape_is_refused(tmp_path: Path, means: torch.Tensor) -> None:
    save_modules(tmp_path, dense())
    save_layer(tmp_path / "2_Dense", DENSE + 1)
    with pytest.raises(ValueError, match=r"linear\..*2_Dense"):
        open_engine(tmp_path)
