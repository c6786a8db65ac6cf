"""ModelConfig says of every config what transformers' own config and model classes say, or refuses it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raydata_llm.engine.model_config import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 1031,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Configs as the model publishers wrote them, before transformers 5 (only what has a meaning for the engine).
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "Qwen2.5-7B-Instruct with yarn": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
}


def new_style(family: str, **settings: Any) -> dict[str, Any]:
    """A config.json as transformers 5 writes it."""
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    saved: dict[str, Any] = json.loads(config.to_json_string())
    return saved


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as transformers 4 wrote it."""
    old = dict(config)
    parameters = dict(old.pop("rope_parameters"))
    old["rope_theta"] = parameters.pop("rope_theta")
    rope_type = parameters.pop("rope_type")
    old["rope_scaling"] = {"type": rope_type, **parameters} if rope_type != "default" else None
    old["torch_dtype"] = old.pop("dtype", None)
    old.pop("layer_types", None)
    return old


def assert_equals_transformers(found: ModelConfig, config: Any) -> None:
    """Every field against transformers' config object, and the parameters against its model."""
    # Typed Any: from_config has no annotations.
    auto_model: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_model.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    assert found.parameter_shapes() == shapes
    attention = model.model.layers[0].self_attn
    assert found.head_dim == attention.head_dim
    assert found.num_heads // found.num_kv_heads == attention.num_key_value_groups
    assert found.num_layers == config.num_hidden_layers
    assert found.rms_norm_eps == config.rms_norm_eps == model.model.norm.variance_epsilon
    assert found.max_position_embeddings == config.max_position_embeddings
    assert found.tie_word_embeddings == config.tie_word_embeddings
    assert found.bos_token_id == config.bos_token_id
    eos = config.eos_token_id
    assert found.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert found.initializer_range == config.initializer_range
    assert found.rope.theta == config.rope_parameters["rope_theta"]
    assert found.rope.rope_type == config.rope_parameters["rope_type"]


def expected_windows(config: Any) -> tuple[int | None, ...]:
    """A window a layer, as transformers' layers take it."""
    if config.model_type == "llama":
        return (None,) * int(config.num_hidden_layers)
    if config.model_type == "mistral":
        return (config.sliding_window,) * int(config.num_hidden_layers)
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {}),
        ("llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": None, "eos_token_id": [2, 7]}),
        ("qwen2", {"eos_token_id": 5, "bos_token_id": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "head_dim": 24}),
        ("qwen3", {"head_dim": 24, "attention_bias": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "hidden_size": 88}),
        ("qwen3", {"tie_word_embeddings": True, "initializer_range": 0.3}),
        ("mistral", {"sliding_window": 11}),
        ("mistral", {"sliding_window": None, "head_dim": 24, "hidden_size": 104}),
    ],
)
def test_each_family_is_translated_as_transformers_reads_it(family: str, settings: dict[str, Any], style: str) -> None:
    config = new_style(family, **settings)
    reference = AutoConfig.for_model(**config)
    found = ModelConfig.from_hf(config if style == "new" else old_style(config))
    assert_equals_transformers(found, reference)
    assert found.sliding_windows == expected_windows(reference)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_translated_as_transformers_reads_them(name: str) -> None:
    reference = AutoConfig.for_model(**PUBLISHED[name])
    found = ModelConfig.from_hf(PUBLISHED[name])
    assert_equals_transformers(found, reference)
    assert found.sliding_windows == expected_windows(reference)
    assert found.dtype == PUBLISHED[name]["torch_dtype"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_saved_again_by_transformers_5_means_the_same(name: str) -> None:
    again = json.loads(AutoConfig.for_model(**PUBLISHED[name]).to_json_string())
    assert "rope_parameters" in again and "rope_scaling" not in again
    assert ModelConfig.from_hf(again) == ModelConfig.from_hf(PUBLISHED[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_means_what_transformers_takes_it_for_or_is_refused(family: str) -> None:
    settings = {"use_sliding_window": True, "num_attention_heads": 32, "num_hidden_layers": 29, "hidden_size": 128}
    complete = old_style(new_style(family, **settings))
    for name in complete.keys() - {"model_type"}:
        config = {key: value for key, value in complete.items() if key != name}
        if name in REQUIRED:
            with pytest.raises(ValueError, match=f"{name} is missing from the model's config: .*hf_overrides"):
                ModelConfig.from_hf(config)
            continue
        reference = AutoConfig.for_model(**config)
        found = ModelConfig.from_hf(config)
        assert_equals_transformers(found, reference)
        assert found.sliding_windows == expected_windows(reference)


def test_llama3_scaling_is_read_from_both_styles() -> None:
    scaling = {**LLAMA3_SCALING, "original_max_position_embeddings": 256, "rope_type": "llama3", "rope_theta": 5e5}
    config = new_style("llama", rope_parameters=scaling)
    found = ModelConfig.from_hf(config)
    assert found == ModelConfig.from_hf(old_style(config))
    assert (found.rope.factor, found.rope.original_max_position_embeddings) == (8.0, 256)
    assert (found.rope.low_freq_factor, found.rope.high_freq_factor) == (1.0, 4.0)
    assert found.context_length == 1024


def test_scaling_that_reaches_beyond_the_config_lengthens_the_context() -> None:
    assert ModelConfig.from_hf(PUBLISHED["Qwen2.5-7B-Instruct with yarn"]).context_length == 131072
    linear = {**SIZES, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}}
    assert ModelConfig.from_hf(linear).context_length == 2560


def test_layer_types_choose_the_layers_with_a_window() -> None:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    qwen = {**SIZES, "model_type": "qwen2", "sliding_window": 8, "layer_types": layer_types}
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).sliding_windows == (8, None, 8)
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": False}).sliding_windows == (None, None, None)


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    found = ModelConfig.from_hf({**SIZES, "model_type": "llama", "head_dim": 24})
    assert found.kv_bytes_per_token(2) == 2 * 3 * 2 * 24 * 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma3"}, "model_type='gemma3' .*not supported: choose a model of type llama, mistral, qwen2"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' .*mixtures of experts are not run; choose a dense model"),
        ({"model_type": "mixtral"}, "model_type='mixtral' .*mixtures of experts"),
        ({"model_type": "llamma"}, r"nearest: llama"),
        ({"model_type": None}, "model_type is missing"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*the engine runs LlamaForCausalLM"),
        ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "architectures=.*choose from LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*silu only"),
        ({"hidden_size": -96}, "hidden_size=-96 .*whole number from 1"),
        ({"vocab_size": 0}, "vocab_size=0 .*whole number from 1"),
        ({"vocab_size": None}, "vocab_size=None .*whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 .*whole number"),
        ({"num_attention_heads": True}, "num_attention_heads=True .*whole number"),
        ({"num_attention_heads": 5, "head_dim": 24}, "num_attention_heads=5 .*multiple of num_key_value_heads=2"),
        ({"hidden_size": 100}, "hidden_size=100 .*without head_dim.*multiple of num_attention_heads=6"),
        ({"head_dim": 23}, "head_dim=23 .*even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 .*above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' .*finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' .*true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' .*give whole numbers"),
        ({"eos_token_id": [2, -1]}, "eos_token_id=.*give whole numbers"),
        ({"torch_dtype": "int8"}, "dtype='int8' .*choose one of float32, bfloat16, float16"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config=.*quantised checkpoints are not run"),
        ({"num_local_experts": 8}, "num_local_experts=8 .*mixtures of experts"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 .*above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' .*must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' .*default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope' .*hf_overrides"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor=-2 .*above 0"),
        ({"rope_scaling": {"type": "yarn"}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor is miss"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "high_freq_factor=4.0 .*must exceed low_freq_factor=4.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .*part of each head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25 .*part of each head"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.*differ between layers"),
        ({"rope_parameters": {"freq_factors": [1.0, 2.0]}}, "freq_factors=.*head_dim / 2 = 8"),
    ],
)
def test_a_config_that_the_engine_does_not_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({"model_type": "llama", **SIZES, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sliding_window": 0}, "sliding_window=0 .*from 1"),
        ({"layer_types": ["full_attention"]}, "layer_types=.*each of 3 layers"),
        ({"layer_types": ["full_attention", "mamba", "mamba"]}, "layer_types='mamba' .*full_attention and sliding"),
    ],
)
def test_wrong_windows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({"model_type": "mistral", **SIZES, "sliding_window": 8, **changes})


def test_the_driver_side_imports_no_torch() -> None:
    code = (
        "import sys, raydata_llm.engine.model_files as m; "
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
