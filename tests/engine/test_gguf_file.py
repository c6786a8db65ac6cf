"""A GGUF file gives the same config and weights as the Hugging Face checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine.gguf_file import GgufFile
from raydata_llm.engine.gguf_header import read_gguf_header
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.weights import load_weights

pytest.importorskip("gguf", reason="gguf, which the tests write files with, is not installed")
import gguf

TinyModel = Callable[..., Path]
Array = npt.NDArray[Any]
# Rows of 32 elements, llama.cpp's smallest quantised block.
SIZES = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 67}


def to_llama_cpp_rows(weight: Array, num_heads: int) -> Array:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama_cpp_name(name: str) -> str:
    """Hugging Face's parameter name as llama.cpp's, through the gguf package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def write_gguf(
    folder: Path,
    path: Path,
    *,
    architecture: str,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    extra: dict[str, Array] | None = None,
) -> None:
    """Convert a checkpoint as llama.cpp's converter does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list(["<s>", "häßlich", *(f"token {i}" for i in range(config.vocab_size - 2))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    fields(writer)
    for name, tensor in {**{k: v.numpy() for k, v in model.state_dict().items()}, **(extra or {})}.items():
        if architecture == "llama" and ".q_proj." in name:
            tensor = to_llama_cpp_rows(tensor, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            tensor = to_llama_cpp_rows(tensor, config.num_key_value_heads)
        gguf_name = name if name in (extra or {}) else llama_cpp_name(name)
        kind = quantization if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_all(files: ModelFiles) -> dict[str, torch.Tensor]:
    config = files.model_config()
    files.check_weights(config)
    device = torch.device("cpu")
    return dict(load_weights(files, config, dtype=torch.float32, device=device, load_format="auto", seed=0))


def test_a_llama_file_gives_back_the_checkpoint_it_was_made_of(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", **SIZES)
    write_gguf(folder, tmp_path / "m.gguf", architecture="llama")
    original = ModelFiles.open(str(folder))
    files = ModelFiles.open(str(tmp_path / "m.gguf"))
    found, wanted = files.model_config(), original.model_config()
    # A GGUF file holds no initializer_range, and its floats are single.
    same = {"initializer_range": 0.02, "rms_norm_eps": 1e-6}
    assert {**vars(found), **same} == {**vars(wanted), **same}
    assert found.rms_norm_eps == pytest.approx(wanted.rms_norm_eps, rel=1e-6)
    weights, expected = load_all(files), load_all(original)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwen_file_keeps_its_rows_and_biases(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model(family, **SIZES)
    write_gguf(folder, tmp_path / "m.gguf", architecture=family)
    files = ModelFiles.open(str(tmp_path / "m.gguf"))
    weights, expected = load_all(files), load_all(ModelFiles.open(str(folder)))
    assert files.model_config().parameter_shapes() == ModelFiles.open(str(folder)).model_config().parameter_shapes()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_biases_of_llama_queries_and_keys_are_reordered_with_their_rows(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", **SIZES, attention_bias=True, mlp_bias=True)
    write_gguf(folder, tmp_path / "m.gguf", architecture="llama")
    files = ModelFiles.open(str(tmp_path / "m.gguf"))
    assert files.model_config().o_bias and files.model_config().mlp_bias
    weights, expected = load_all(files), load_all(ModelFiles.open(str(folder)))
    for name in (name for name in expected if name.endswith(".bias")):
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_rows_are_undone_as_the_gguf_package_does(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    # head_dim 16 makes every row a whole number of blocks.
    folder = tiny_model("llama", **SIZES, head_dim=16)
    quantization = gguf.GGMLQuantizationType[kind]
    write_gguf(folder, tmp_path / "m.gguf", architecture="llama", quantization=quantization)
    files = ModelFiles.open(str(tmp_path / "m.gguf"))
    weights, original = load_all(files), load_all(ModelFiles.open(str(folder)))
    for name, weight in weights.items():
        expected = original[name]
        if expected.ndim == 2:
            quantised = gguf.quantize(expected.numpy(), quantization)
            expected = torch.from_numpy(gguf.dequantize(quantised, quantization))
        assert torch.equal(weight, expected), name
    assert files.model_config().dtype == ("float16" if kind == "F16" else "bfloat16")


def test_rope_factors_scaling_and_end_of_turn_are_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    def fields(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(256)
        writer.add_eot_token_id(9)

    factors = np.linspace(1.0, 8.0, 12, dtype=np.float32)
    extra = {"rope_freqs.weight": factors}
    folder = tiny_model("llama", **SIZES)
    write_gguf(folder, tmp_path / "m.gguf", architecture="llama", fields=fields, extra=extra)
    files = ModelFiles.open(str(tmp_path / "m.gguf"))
    config = files.model_config()
    files.check_weights(config)
    assert config.rope.freq_factors == tuple(factors.tolist())
    assert (config.rope.rope_type, config.rope.factor) == ("yarn", 4.0)
    assert config.rope.original_max_position_embeddings == 256
    assert files.eos_token_ids(config) == (2, 9)
    assert config.bos_token_id == 1


def test_a_window_in_a_llama_file_makes_it_a_mistral(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_gguf(
        tiny_model("mistral", **SIZES),
        tmp_path / "m.gguf",
        architecture="llama",
        fields=lambda writer: writer.add_sliding_window(16),
    )
    config = ModelFiles.open(str(tmp_path / "m.gguf")).model_config()
    assert config.architecture == "MistralForCausalLM"
    assert config.sliding_windows == (16, 16)


def test_a_tied_head_is_taken_from_the_embedding(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", **SIZES, tie_word_embeddings=True)
    write_gguf(folder, tmp_path / "m.gguf", architecture="llama")
    read = read_gguf_header(tmp_path / "m.gguf").tensors
    # The converter above stores what state_dict names, tied or not; llama.cpp leaves the copy out.
    assert "output.weight" in read
    files = ModelFiles.open(str(tmp_path / "m.gguf"), hf_overrides={"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_all(files)


@pytest.mark.parametrize(
    "fields, message",
    [
        (lambda writer: writer.add_expert_count(8), "num_experts=8 .*mixtures of experts"),
        (lambda writer: writer.add_uint16("split.count", 3), r"split.count=3 .*gguf-split --merge"),
        (lambda writer: writer.add_rope_dimension_count(12), "partial_rotary_factor=0.5 .*part of each head"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope_type='longrope'"),
    ],
)
def test_what_the_engine_does_not_run_is_refused(
    fields: Callable[[gguf.GGUFWriter], None], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    write_gguf(tiny_model("llama", **SIZES), tmp_path / "m.gguf", architecture="llama", fields=fields)
    with pytest.raises(ValueError, match=message):
        ModelFiles.open(str(tmp_path / "m.gguf")).model_config()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general.architecture='gemma3' .*choose one of llama, qwen2, qwen3"):
        ModelFiles.open(str(tmp_path / "m.gguf"))


def test_a_missing_tensor_is_found_before_loading(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", **SIZES)
    write_gguf(folder, tmp_path / "m.gguf", architecture="llama", extra={"blk.7.attn_q.weight": np.zeros((2, 2), "f")})
    files = ModelFiles.open(str(tmp_path / "m.gguf"), hf_overrides={"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"missing: model.layers.2.*unknown: model.layers.7.self_attn.q_proj.weight"):
        files.check_weights(files.model_config())


def test_a_file_cut_short_anywhere_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama", **SIZES), tmp_path / "m.gguf", architecture="llama")
    whole = (tmp_path / "m.gguf").read_bytes()
    data_start = min(tensor.start for tensor in read_gguf_header(tmp_path / "m.gguf").tensors.values())
    cuts = [0, 3, 23, 24, 40, *range(60, data_start, data_start // 60), data_start, len(whole) // 2, len(whole) - 64]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut.gguf.* is damaged or not a GGUF file: .*download it again"):
            ModelFiles.open(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"NOPE" + bytes(60), "it begins with b'NOPE'"),
        (b"GGUF\x01\x00\x00\x00" + bytes(60), "version 1 is not 2 or 3"),
        (b"GGUF\x00\x00\x00\x03" + bytes(60), "version 50331648 is not 2 or 3"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 60, "its header counts"),
    ],
)
def test_what_is_no_gguf_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GgufFile.open(tmp_path / "m.gguf")


@pytest.mark.model
def test_the_demos_model_is_read_as_transformers_reads_it(demo_model: Path, demo_reference: Any) -> None:
    reference = demo_reference.state_dict()
    files = ModelFiles.open(str(demo_model))
    config = files.model_config()
    files.check_weights(config)
    shapes = {name: tuple(weight.shape) for name, weight in reference.items() if name != "lm_head.weight"}
    assert config.parameter_shapes() == shapes
    assert config.rope.theta == demo_reference.config.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == demo_reference.config.rms_norm_eps
    assert config.context_length == demo_reference.config.max_position_embeddings
    assert config.eos_token_ids == (demo_reference.config.eos_token_id,)
    gguf_file = GgufFile.open(demo_model)
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.17.self_attn.k_proj.weight",
        "model.layers.29.self_attn.v_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
        "model.layers.3.input_layernorm.weight",
    ):
        assert torch.equal(torch.from_numpy(gguf_file.read(name)), reference[name]), name
