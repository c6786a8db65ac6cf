"""resolve_model and check_model: local, S3 (moto), other stores, the Hub's cache, and the node's own cache."""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from safetensors.numpy import save_file

from raydata_llm import model_cache
from raydata_llm.adapter_source import resolve_adapter
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.model_source import check_model, resolve_model
from raydata_llm.remote_model import RemoteModel, wanted_files
from tests.engine.tiny_pooling import dense, save_layer, save_modules, save_pooling_model
from tests.raydata_llm.patience import on_this_machine

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYDATA_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    created = boto3.resource("s3", endpoint_url=s3_endpoint).Bucket("models")
    created.create()
    yield created
    created.objects.all().delete()
    created.delete()


def make_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    shapes = ModelConfig.from_hf(config).parameter_shapes()
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def upload(bucket: Any, folder: Path, prefix: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), f"{prefix}/{file.relative_to(folder)}")


def settings(**engine_kwargs: Any) -> EngineConfig:
    return EngineConfig.from_mapping("m", engine_kwargs)


def test_local_folder_and_gguf_file_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "home" / "model")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_model(str(folder)) == str(folder)
    assert resolve_model("~/model") == str(folder)
    assert resolve_model(f"file://{folder}") == str(folder)
    assert resolve_model(str(gguf)) == str(gguf)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("", "is not valid"),
        ("/no/such/folder", "no such folder or file"),
        ("no-org/no-model", "HF_HUB_OFFLINE=1"),
        ("ftq://host/model", "cannot be read"),
    ],
)
def test_what_is_not_there_is_one_value_error(source: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"model_source='{source}'.*{complaint}"):
        resolve_model(source)


def test_a_folder_without_config_names_the_gguf_in_it(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"no config.json in the folder: name the file itself, such as some.gguf"):
        resolve_model(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file, but no .gguf file"):
        resolve_model(str(tmp_path / "weights.bin"))


def test_s3_folder_is_fetched_once_and_completed_when_weights_are_asked_for(bucket: Any, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "README.md").write_text("notes")
    upload(bucket, source, "org/m")
    uri = "s3://models/org/m/"

    folder = Path(resolve_model(uri, weights=False))
    assert sorted(file.name for file in folder.glob("[!.]*")) == ["config.json", "tokenizer.json"]
    fetched_at = (folder / "config.json").stat().st_mtime_ns

    assert resolve_model(uri) == str(folder)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (folder / "config.json").stat().st_mtime_ns == fetched_at
    assert not (folder / ".incoming").exists()


def test_dummy_weights_are_not_fetched(bucket: Any, tmp_path: Path) -> None:
    upload(bucket, make_model(tmp_path / "source"), "m")
    folder = Path(resolve_model("s3://models/m", load_format="dummy"))
    assert not list(folder.glob("*.safetensors"))


def test_a_changed_remote_is_fetched_again_and_a_removed_file_goes(bucket: Any, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "merges.txt").write_text("a b")
    upload(bucket, source, "m")
    folder = Path(resolve_model("s3://models/m"))
    (source / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 4096}))
    bucket.upload_file(str(source / "config.json"), "m/config.json")
    bucket.Object("m/merges.txt").delete()
    assert Path(resolve_model("s3://models/m")) == folder
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 4096
    assert not (folder / "merges.txt").exists()


def test_a_large_file_arrives_whole_from_parallel_ranges(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "_CHUNK_BYTES", 1000)
    content = np.random.default_rng(0).bytes(10_237)
    bucket.put_object(Key="big/model.gguf", Body=content)
    path = Path(resolve_model("s3://models/big/model.gguf", weights=False))
    assert path.name == "model.gguf"
    assert path.read_bytes() == content


def test_what_a_killed_fetch_left_is_not_taken_for_the_model(bucket: Any, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    upload(bucket, source, "m")
    folder = Path(resolve_model("s3://models/m", weights=False))
    (folder / ".incoming").mkdir()
    (folder / ".incoming" / "model.safetensors").write_bytes(b"half")
    assert resolve_model("s3://models/m") == str(folder)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_several_processes_agree_on_one_whole_folder(bucket: Any, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    upload(bucket, source, "m")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.map(resolve_model, ["s3://models/m"] * 3)
    assert len(set(paths)) == 1
    assert (Path(paths[0]) / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_any_store_that_fsspec_knows_works(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/org/m/config.json", b'{"model_type": "llama"}')
    folder = Path(resolve_model("memory://org/m"))
    assert (folder / "config.json").read_bytes() == b'{"model_type": "llama"}'
    store.pipe("/org/m/config.json", b'{"model_type": "qwen3"}')
    assert Path(resolve_model("memory://org/m")) == folder
    assert (folder / "config.json").read_bytes() == b'{"model_type": "qwen3"}'


def test_a_missing_bucket_a_missing_folder_and_a_missing_file_are_told_apart(bucket: Any) -> None:
    with pytest.raises(ValueError, match=r"model_source='s3://nobucket/m' not found: its bucket does not exist"):
        resolve_model("s3://nobucket/m")
    with pytest.raises(ValueError, match=r"model_source='s3://models/nothing' not found: check bucket and folder"):
        resolve_model("s3://models/nothing")
    with pytest.raises(ValueError, match=r"not found: there is no file at that place"):
        resolve_model("s3://models/nothing.gguf")


@pytest.mark.parametrize(
    "source",
    ["s3://AKIA:{}@bucket/my model", "s3://AKIA:wJalr/{}@bucket/model", "nowhere://me:{}@bucket/model"],
    ids=["a space", "a key with a slash", "an unknown store"],
)
def test_no_message_holds_the_key_of_an_address(source: str) -> None:
    canary = "canary-Secret-7731"
    for find in (resolve_model, resolve_adapter):
        with pytest.raises(ValueError, match=r"\*\*\*@bucket") as caught:
            find(source.format(canary))
        assert canary not in "".join(traceback.format_exception(caught.value)), "in what it is chained to neither"


def test_wrong_credentials_are_named_as_the_cause() -> None:
    # The server checks keys only when it was started so, hence a process of its own.
    script = """
import os
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:%d" % server.get_host_and_port()[1]
from raydata_llm.model_source import resolve_model
try:
    resolve_model("s3://models/m")
except ValueError as error:
    print(error)
server.stop()
"""
    keys = {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong", "INITIAL_NO_AUTH_ACTION_COUNT": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**_environ(), **keys})
    assert "model_source='s3://models/m' was refused: check the credentials" in done.stdout, done.stderr


def _environ() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_a_remote_folder_without_config_is_refused(bucket: Any) -> None:
    bucket.put_object(Key="m/model.safetensors", Body=b"x")
    with pytest.raises(ValueError, match=r"model_source='s3://models/m' has no config.json in the folder"):
        resolve_model("s3://models/m")


def test_only_what_the_engine_reads_is_wanted() -> None:
    names = [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "README.md",
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.Q4_K_M.gguf",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "training_args.bin",
    ]
    metadata = [*names[:2], "additional_chat_templates/tool_use.jinja", "config.json"]
    assert wanted_files(names, weights=False) == metadata
    assert wanted_files(names, weights=True) == [*metadata, *names[8:10], names[2]]
    assert wanted_files(names, weights=True, load_format="pt") == [*metadata, "pytorch_model.bin", names[3]]


def test_a_remote_embedders_dense_layer_is_fetched_and_checked(bucket: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_pooling_model(Path(folder), "bert")
        save_modules(Path(folder), dense())
        save_layer(Path(folder) / "2_Dense")
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        for path in files:
            bucket.put_object(Key=f"dense/{path.relative_to(folder)}", Body=path.read_bytes())
        fetched = Path(resolve_model("s3://models/dense", weights=True))
        assert {path.relative_to(folder) for path in files} <= {
            path.relative_to(fetched) for path in fetched.rglob("*") if path.is_file()
        }
    check_model("s3://models/dense", EngineConfig(model="s3://models/dense"), task="embed")
    bucket.put_object(Key="dense/2_Dense/config.json", Body=json.dumps(dense(out_features=21)[1]).encode())
    with pytest.raises(ValueError, match=r"linear.weight is \[20, 48\], not \[21, 48\]"):
        check_model("s3://models/dense", EngineConfig(model="s3://models/dense"), task="embed")


def test_hub_id_is_read_from_the_hubs_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    snapshot = hub / "models--org--name" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    make_model(snapshot)
    (hub / "models--org--name" / "refs").mkdir()
    (hub / "models--org--name" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert resolve_model("org/name") == str(snapshot)
    assert resolve_model(f"org/name@{snapshot.name}", weights=False) == str(snapshot)
    check_model("org/name", settings())
    for name in ("org/name@other", "n" * 5000):
        with pytest.raises(ValueError, match=f"'{name}' not found"):
            resolve_model(name)


def test_a_hub_that_is_away_is_asked_once_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and not listened to
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        began = time.monotonic()
        with pytest.raises(ValueError) as error:
            resolve_model("org/name")
        assert time.monotonic() - began < on_this_machine(5)
    told = str(error.value)
    for words in ("model_source='org/name' not found", endpoint, str(tmp_path), "HF_ENDPOINT"):
        assert words in told, told


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydata_llm.model_source._HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        began = time.monotonic()
        with pytest.raises(ValueError, match="cannot be reached"):
            resolve_model("org/name")
        assert time.monotonic() - began < on_this_machine(5)


def test_a_google_store_that_is_away_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydata_llm.remote_model._GCS_SECONDS", 1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ValueError, match="could not be read: check the network"):
            resolve_model(f"gs://anonymous@bucket/model?scheme=http&endpoint_override={endpoint}")
        assert time.monotonic() - began < on_this_machine(15)


@pytest.mark.parametrize("source", ["hf://org/name", "https://huggingface.co/org/name/tree/main"])
def test_an_address_of_the_hub_is_told_as_an_id(source: str) -> None:
    with pytest.raises(ValueError, match=f"model_source='{source}' is an address of the Hub: .* id, 'org/name'"):
        resolve_model(source)


@pytest.mark.parametrize("source", ["s3://", "s3:///folder", "gs://"])
def test_an_address_without_a_bucket_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=f"model_source='{source}' names no bucket: give {source[:2]}://bucket/folder"):
        resolve_model(source)


def test_check_accepts_a_whole_local_model_and_finds_a_truncated_one(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    check_model(str(folder), settings(max_model_len=64))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="bytes past the end of the file"):
        check_model(str(folder), settings())
    check_model(str(folder), settings(load_format="dummy"))


def test_check_refuses_a_max_model_len_beyond_the_models(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    with pytest.raises(ValueError, match=r"max_model_len=65 .* made for 64 tokens.*rope_scaling"):
        check_model(str(folder), settings(max_model_len=65))
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    check_model(str(folder), settings(max_model_len=128, hf_overrides=scaled))


def test_check_refuses_an_unknown_model_type(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt9", "architectures": ["Gpt9"]}))
    with pytest.raises(ValueError, match=r"[Gg]pt9"):
        check_model(str(folder), settings())


def test_check_reads_a_remote_models_headers_only(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(bucket, make_model(tmp_path / "source", vocab_size=50_000), "m")
    lengths: list[int] = []
    read = RemoteModel.read

    def counted(remote: RemoteModel, name: str, start: int, length: int) -> bytes:
        content = read(remote, name, start, length)
        lengths.append(len(content))
        return content

    monkeypatch.setattr(RemoteModel, "read", counted)
    check_model("s3://models/m", settings())
    assert sum(lengths) < 10_000
    assert not model_cache.cache_folder("models").exists()


def test_check_names_a_remote_model_by_its_uri(bucket: Any, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:-100])
    upload(bucket, source, "m")
    with pytest.raises(ValueError, match=r"'s3://models/m/model.safetensors' is damaged.*past the end"):
        check_model("s3://models/m", settings())
    bucket.Object("m/model.safetensors").delete()
    with pytest.raises(ValueError, match=r"model='s3://models/m' has no weights"):
        check_model("s3://models/m", settings())


def test_checking_imports_no_torch(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    script = (
        "import sys; from raydata_llm.model_source import check_model; "
        "from raydata_llm.engine.engine_config import EngineConfig; "
        f"check_model({str(folder)!r}, EngineConfig(model='m')); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_cache_folder_that_cannot_be_written_is_named(bucket: Any, tmp_path: Path, cache: Path) -> None:
    upload(bucket, make_model(tmp_path / "source"), "m")
    cache.write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"RAYDATA_LLM_CACHE=.* cannot be written"):
        resolve_model("s3://models/m")
