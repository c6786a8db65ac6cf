"""What a user gets wrong, on a Ray of two CPUs: one ValueError within 30 s that names the thing and the remedy.

Each mistake is made through the public functions, with the real engine, where a user would make it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raydata_llm import EngineProcessorConfig, build_llm_processor, write_parquet
from tests.raydata_llm.patience import on_this_machine
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.s3_stand import BUCKET, SECRET, S3Stand, s3_stand
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SETTINGS: dict[str, Any] = {"device": "cpu", "max_model_len": 128, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Stand]:
    with s3_stand() as stand, ray_session(**stand.environment):
        yield stand


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


def build(model: object, **fields: Any) -> Any:
    settings = {**SETTINGS, **fields.pop("engine_kwargs", {})}
    config = EngineProcessorConfig(model_source=str(model), engine_kwargs=settings, **fields)
    return build_llm_processor(config, preprocess=lambda row: {"prompt": "ab", "sampling_params": {"max_tokens": 2}})


def damaged(model: Path, folder: Path, name: str, keep: int) -> Path:
    """The model with a file cut short."""
    shutil.copytree(model, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    return folder


# What each says: the field, its value and the remedy, in these words.
AT_BUILD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "concurrency": ({"concurrency": 0}, ["concurrency", "0", "give"]),
    "unknown setting": ({"engine_kwargs": {"max_num_seq": 8}}, ["max_num_seq", "max_num_seqs"]),
    "too long": ({"engine_kwargs": {"max_model_len": 10**9}}, ["max_model_len=1000000000", "1024"]),
    "too many ranks": (
        {"engine_kwargs": {"tensor_parallel_size": 4}},
        ["tensor_parallel_size=4", "num_attention_heads"],
    ),
}


@pytest.fixture(autouse=True)
def soon(s3: S3Stand) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < on_this_machine(30)


def check_words(error: BaseException, words: list[str]) -> None:
    told = str(error)
    assert all(word in told for word in words), told
    assert SECRET not in told and "ActorDiedError" not in told


@pytest.mark.parametrize("mistake", AT_BUILD)
def test_settings_that_cannot_work_are_refused_at_build(mistake: str, model: Path) -> None:
    fields, words = AT_BUILD[mistake]
    with pytest.raises(ValueError) as error:
        build(model, **fields)
    check_words(error.value, words)


@pytest.mark.parametrize("mistake", ["missing folder", "cut weights", "unknown architecture"])
def test_a_model_that_cannot_be_read_is_refused_at_build(mistake: str, model: Path, tmp_path: Path) -> None:
    if mistake == "missing folder":
        source, words = Path("/no/such/folder"), ["model_source='/no/such/folder'", "no such folder", "give a folder"]
    elif mistake == "cut weights":
        source, words = damaged(model, tmp_path / "m", "model.safetensors", 5000), ["model.safetensors", "again"]
    else:
        source, words = tmp_path / "m", ["model_type='mamba9'", "llama"]
        shutil.copytree(model, source)
        (source / "config.json").write_text('{"model_type": "mamba9"}')
    with pytest.raises(ValueError) as error:
        build(source)
    check_words(error.value, words)


@pytest.mark.parametrize("mistake", ["missing bucket", "wrong credentials", "unwritable folder", "unknown scheme"])
def test_an_output_that_cannot_be_written_is_refused_at_the_sinks_call(
    mistake: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, words = {
        "missing bucket": ("s3://no-such-bucket/x", ["s3://no-such-bucket/x", "check the bucket's name"]),
        "wrong credentials": (f"s3://{BUCKET}/x", [f"s3://{BUCKET}/x", "check the credentials"]),
        "unwritable folder": ("/proc/nothing", ["/proc/nothing", "it does not exist: check bucket and folder"]),
        "unknown scheme": ("nonsense://x/y", ["nonsense://x/y", "use s3://"]),
    }[mistake]
    if mistake == "wrong credentials":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
        monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    dataset = build(model)(ray.data.range(4))
    with pytest.raises(ValueError) as error:
        write_parquet(dataset, place)
    check_words(error.value, words)


@pytest.mark.parametrize("mistake", ["too little KV", "no tokenizer"])
def test_what_only_a_worker_can_find_ends_the_job_before_weights_load(
    mistake: str, model: Path, tmp_path: Path
) -> None:
    source, settings, words = model, {}, ["no tokenizer that can be read", "tokenizer="]
    if mistake == "no tokenizer":
        source = tmp_path / "m"
        shutil.copytree(model, source, ignore=shutil.ignore_patterns("tokenizer*"))
    else:
        settings, words = {"kv_cache_memory_bytes": 1000}, ["max_model_len=128", "kv_cache_memory_bytes=1000"]
    dataset = build(source, engine_kwargs=settings)(ray.data.range(4))
    with pytest.raises(ValueError) as error:
        write_parquet(dataset, tmp_path / "out")
    check_words(error.value, words)
    assert not list((tmp_path / "out").glob("*.parquet"))
