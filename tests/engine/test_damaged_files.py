"""Damaged and hostile model files: one ValueError that names the file, in bounded time and memory."""

from __future__ import annotations

import json
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from raydata_llm.engine.adapter import read_adapter
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.gguf_file import GgufFile
from raydata_llm.engine.gguf_header import read_gguf_header
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.pooling_model import PoolingModel, choose_runner
from raydata_llm.engine.safetensors_file import read_header

WEIGHTS = "model.safetensors"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BERT: dict[str, Any] = {
    **{name: CONFIG[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
    "model_type": "bert",
    "architectures": ["BertModel"],
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Fields that a config may have beside those above.
MORE_FIELDS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "layer_types"),
    *("max_window_layers", "use_sliding_window", "attention_bias", "mlp_bias", "hidden_act", "dtype", "torch_dtype"),
    *("eos_token_id", "bos_token_id", "initializer_range", "quantization_config", "num_experts", "num_labels"),
    *("id2label", "problem_type", "matryoshka_dimensions", "is_matryoshka", "sentence_transformers", "is_causal"),
    *("sbert_ce_default_activation_function", "classifier_from_token", "method", "is_original_qwen3_reranker"),
    *("layer_norm_eps", "type_vocab_size", "position_embedding_type", "is_decoder", "use_sep_token"),
)
ROPE_FIELDS = (
    *("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "mscale", "truncate"),
    *("original_max_position_embeddings", "freq_factors", "attention_factor", "rope_theta"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama's folder."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shapes = ModelConfig.from_hf(CONFIG).parameter_shapes()
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS)
    return tmp_path


def check(folder: Path) -> None:
    """What the driver looks at."""
    files = ModelFiles.open(str(folder))
    if choose_runner(EngineConfig(model=str(folder)), files) == "generate":
        model = files.model_config()
        files.check_weights(model)
        files.eos_token_ids(model)
    else:
        pooling = PoolingModel.open(files, EngineConfig(model=str(folder)))
        files.check_weights(pooling, pooling.parameter_name)
        assert pooling.max_model_len(EngineConfig(model=str(folder))) > 0


@contextmanager
def little_memory(most: int = 64 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_the_folder_that_the_tests_damage_is_sound(folder: Path) -> None:
    check(folder)


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
DIGITS = b'{"a": ' + b"9" * 100_000 + b"}"


@pytest.mark.parametrize("raw", [DEEP, DIGITS, b"\xff\xfe{}", b"[]", b'{"a":1e999', b"", b"\0" * 100], ids=range(7))
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json", WEIGHTS])
def test_what_is_no_json_object_is_named_with_its_file(folder: Path, name: str, raw: bytes) -> None:
    if name == WEIGHTS:
        write_header(folder / name, raw)
    else:
        (folder / name).write_bytes(raw)
    if "index" in name:
        (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as told:
        check(folder)
    assert "download it again" in str(told.value) and len(str(told.value)) < 1000


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype": "F32", "shape": [31, 8], "data_offsets": [0, 1e999]}',
        '{"dtype": "F32", "shape": [31, 8], "data_offsets": [0, 99999999999999999999999]}',
        '{"dtype": "F32", "shape": [31, 8], "data_offsets": [-992, 0]}',
        '{"dtype": "F32", "shape": [-31, -8], "data_offsets": [0, 992]}',
        '{"dtype": "F32", "shape": [31, 8.0], "data_offsets": [0, 992]}',
        '{"dtype": "F32", "shape": [true, 8], "data_offsets": [0, 32]}',
        '{"dtype": "F32", "shape": [NaN, 8], "data_offsets": [0, 992]}',
        '{"dtype": {"a": 1}, "shape": [31, 8], "data_offsets": [0, 992]}',
        '{"dtype": "F32", "shape": ' + json.dumps([1 << 62] * 10_000) + ', "data_offsets": [0, 992]}',
        '{"dtype": "F32", "shape": [31, 8], "data_offsets": [0, 992, 1]}',
        '{"dtype": "F32", "shape": "31", "data_offsets": "01"}',
        "[]",
        "null",
        "7",
    ],
)
def test_a_garbled_tensor_is_named_with_its_file(folder: Path, entry: str) -> None:
    header = f'{{"model.embed_tokens.weight": {entry}}}'
    write_header(folder / WEIGHTS, header.encode(), bytes(992))
    with pytest.raises(ValueError, match=r"model\.safetensors.*embed_tokens.*download") as told:
        check(folder)
    assert len(str(told.value)) < 1000


def test_tensors_that_share_bytes_and_names_given_twice_are_refused(tmp_path: Path) -> None:
    one = '{"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'
    write_header(tmp_path / "a", f'{{"x": {one % (0, 8)}, "y": {one % (4, 12)}}}'.encode(), bytes(12))
    with pytest.raises(ValueError, match="x and y share bytes"):
        read_header(tmp_path / "a")
    write_header(tmp_path / "b", f'{{"x": {one % (0, 8)}, "x": {one % (8, 16)}}}'.encode(), bytes(16))
    with pytest.raises(ValueError, match="twice"):
        read_header(tmp_path / "b")


def put_folder(path: Path) -> None:
    path.mkdir()


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    # The path of a socket has 107 characters at most.
    before = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def put_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [put_folder, put_pipe, put_socket, put_dangling_link, put_device])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", WEIGHTS, "pytorch_model.bin", "model-00001-of-00001.safetensors"]
)
def test_what_is_no_file_is_named_and_never_waited_for(folder: Path, name: str, put: Callable[[Path], None]) -> None:
    if name.startswith(("model-", "pytorch")):
        (folder / WEIGHTS).unlink()
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        check(folder)


@pytest.mark.parametrize("put", [put_folder, put_pipe, put_dangling_link, put_device])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapters_file_that_is_none_is_named(tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    if name != "adapter_config.json":
        (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "peft_type": "LORA"}')
    put(tmp_path / name)
    with pytest.raises(ValueError, match="adapter"):
        read_adapter(tmp_path, ModelConfig.from_hf(CONFIG), max_rank=8)


@pytest.mark.parametrize("raw", [DEEP, DIGITS, b'{"r": 1e999}', b'{"r": 4, "lora_alpha": 1e999}', b"[]", b"\xff"])
def test_an_adapters_config_that_is_none_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(raw)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter"):
        read_adapter(tmp_path, ModelConfig.from_hf(CONFIG), max_rank=8)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/x.safetensors", "a/../../b.safetensors", 7, None, [1]])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, name: Any) -> None:
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    save_file({"x": torch.zeros(1)}, folder.parent / "other.safetensors")
    index = {"weight_map": {"a": "part.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map of .*no file in the model's folder"):
        check(folder)


def test_an_index_that_names_other_files_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "config.json"}}')
    with pytest.raises(ValueError, match=r"names config.json, no \.safetensors files"):
        check(folder)


def test_the_hubs_cache_of_links_to_a_folder_beside_is_read(folder: Path) -> None:
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, (name, link) in enumerate([("config.json", "config.json"), (WEIGHTS, "model-1.safetensors")]):
        (folder / name).rename(blobs / str(number))
        (snapshot / link).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    check(snapshot)


@pytest.mark.parametrize("at", ["../out", "/etc", 7])
def test_a_pooling_folder_outside_the_models_is_refused(tmp_path: Path, at: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    modules = [{"type": "sentence_transformers.models.Pooling", "path": at}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json"):
        PoolingModel.open(ModelFiles.open(str(tmp_path), load_format="dummy"), EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**6, 10**9, 10**30, -1, 1e9, True)),
        *(("num_attention_heads", value) for value in (10**7, 10**40)),
        *((name, 10**12) for name in ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size")),
        *((name, 10**12) for name in ("num_key_value_heads", "head_dim", "eos_token_id", "sliding_window")),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 10**400),
    ],
    ids=lambda value: str(value)[:20],
)
def test_absurd_sizes_are_refused_by_field_and_value(folder: Path, name: str, value: Any) -> None:
    config = {**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"], name: value}
    (folder / "config.json").write_text(json.dumps(config))
    with little_memory(), pytest.raises(ValueError, match=rf"{name}=.*is not valid: it must be|{name}=.*give whole"):
        check(folder)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 5000),
    st.floats(),
    st.sampled_from([10**6, 2**31, 2**63, 10**30, 10**400, 1e300, -1e300, 1e-320]),
    st.text(max_size=6),
    st.sampled_from(
        ["llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "distilbert", "yarn", "linear", "llama3"]
    ),
    st.sampled_from(
        ["BertForSequenceClassification", "Qwen3ForCausalLM", "bfloat16", "from_2_way_softmax", "Qwen2Model"]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
ROPES = st.dictionaries(st.sampled_from(ROPE_FIELDS), SCALARS | st.sampled_from(["yarn", "linear", "llama3"]))


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([CONFIG, {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, BERT]),
    changes=st.dictionaries(st.sampled_from([*CONFIG, "pad_token_id", *MORE_FIELDS]), VALUES, min_size=1, max_size=4),
    rope=st.none() | ROPES,
)
def test_any_value_in_a_config_runs_or_is_a_value_error(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    config = {**base, **changes, **({} if rope is None else {"rope_scaling": rope})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        files = ModelFiles.open(str(tmp_path), load_format="dummy")
        settings = EngineConfig(model=str(tmp_path))
        if choose_runner(settings, files) == "generate":
            model = files.model_config()
            assert model.context_length > 0 and len(model.parameter_shapes()) > 0
        else:
            pooling = PoolingModel.open(files, settings)
            assert pooling.tasks and pooling.parameter_shapes() and pooling.max_model_len(settings) > 0
    except ValueError as error:
        assert len(str(error)) < 2000


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": VALUES | st.sampled_from(["F32", "BF16", "U8", "Q"]),
        "shape": VALUES | st.lists(st.integers(0, 4)),
        "data_offsets": VALUES | st.lists(st.integers(0, 64), min_size=2, max_size=2),
    }
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=VALUES | st.dictionaries(st.text(max_size=5), ENTRIES | VALUES, max_size=4), cut=st.integers(0, 20))
def test_any_safetensors_header_is_read_or_a_value_error(tmp_path: Path, header: Any, cut: int) -> None:
    path = tmp_path / WEIGHTS
    write_header(path, json.dumps(header).encode(), bytes(64))
    os.truncate(path, max(0, path.stat().st_size - cut))
    try:
        assert all(0 <= one.start <= one.end <= path.stat().st_size for one in read_header(path).values())
    except ValueError as error:
        assert WEIGHTS in str(error) and len(str(error)) < 2000


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_bytes() -> bytes:
    """A small, sound header with fields of all kinds and a tensor."""
    fields = [
        gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama"),
        gguf_text("llama.block_count") + struct.pack("<II", 4, 2),
        gguf_text("llama.rope.freq_base") + struct.pack("<If", 6, 10000.0),
        gguf_text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("b"),
        gguf_text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.5),
    ]
    tensor = gguf_text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 3, 0, 0)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(fields)) + b"".join(fields) + tensor
    return header + bytes(-len(header) % 32) + bytes(96)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_gguf_header_is_read_or_a_value_error(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(gguf_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 8))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 2**20, 2**24, 2**32, 2**63, 2**64 - 1])))
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(raw))
    with little_memory():
        try:
            files = ModelFiles.open(str(path))
            files.check_weights(files.model_config())
        except ValueError as error:
            assert len(str(error)) < 2000


def test_a_sound_gguf_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes())
    assert read_gguf_header(path).tensors["token_embd.weight"].shape == (3, 8)
    assert GgufFile.open(path).hf_config()["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("general.architecture", 4, struct.pack("<I", 7)),
        ("general.architecture", 9, struct.pack("<IQI", 4, 1, 7)),
        ("split.count", 8, gguf_text("many")),
        ("llama.rope.dimension_count", 8, gguf_text("half")),
        ("llama.rope.scaling.type", 9, struct.pack("<IQI", 4, 1, 7)),
        ("llama.attention.key_length", 8, gguf_text("all")),
        ("general.alignment", 4, struct.pack("<I", 0)),
    ],
)
def test_metadata_of_another_type_are_a_value_error(tmp_path: Path, key: str, kind: int, value: bytes) -> None:
    architecture = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    rotary = gguf_text("llama.rope.dimension_count") + struct.pack("<II", 4, 4)
    fields = [architecture, rotary, gguf_text(key) + struct.pack("<I", kind) + value]
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + b"".join(fields))
    with pytest.raises(ValueError):
        ModelFiles.open(str(path)).model_config()
