"""Folders in stores: whole files, plain words when they cannot be, and no credentials in them."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from pyarrow.fs import LocalFileSystem, S3FileSystem

from raydata_llm.redaction import redact
from raydata_llm.sink_errors import Patience, explain, may_pass, patiently
from raydata_llm.sink_storage import Storage
from tests.raydata_llm.s3_stand import BUCKET, SECRET, S3Stand, s3_stand

QUICK = Patience(tries=6, first_wait=0.01, longest_wait=0.02)
NAME = "part-00000000-000000.parquet"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Stand]:
    with s3_stand() as stand:
        yield stand


@pytest.fixture(params=["pyarrow", "s3fs"])
def store(request: pytest.FixtureRequest, s3: S3Stand) -> Iterator[Storage]:
    if request.param == "pyarrow":
        yield Storage.open(f"s3://{BUCKET}/pyarrow", patience=QUICK)
    else:
        filesystem = s3fs.S3FileSystem(endpoint_url=s3.endpoint, config_kwargs={"retries": {"max_attempts": 1}})
        yield Storage.open(f"{BUCKET}/s3fs", filesystem, QUICK)
    s3.fault = lambda method, path: None


@pytest.fixture(params=["path", "pyarrow", "fsspec"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    filesystems: dict[str, Any] = {"path": None, "pyarrow": LocalFileSystem(), "fsspec": fsspec.filesystem("file")}
    return Storage.open(tmp_path / "made" / "on demand", filesystems[request.param])


@pytest.mark.parametrize(
    "folder", ["my answers", "run#2", "ts=12%3A30", "50%", "a+b&c=d", "größe/[1]", "x//y", "me@home:1"]
)
def test_a_folder_on_s3_is_the_one_that_is_named(s3: S3Stand, folder: str) -> None:
    for address in (f"s3://{BUCKET}/{folder}", f"s3://{BUCKET}/{folder}/?region=us-east-1"):
        assert Storage.open(address).root == f"{BUCKET}/{folder}"


def check_files(storage: Storage) -> None:
    storage.check_writable()
    assert storage.sizes() == {}
    for content in (b"once", b"twice, which is longer"):
        storage.put(NAME, content)
        assert storage.get(NAME) == content and storage.size(NAME) == len(content)
    storage.put("folder/one", b"")
    assert storage.sizes() == {NAME: 22} and storage.sizes("folder") == {"one": 0}
    storage.move(NAME, "folder/two")
    assert storage.sizes() == {} and storage.size("nothing") is None
    for name in ("folder/one", "folder/two", "folder/two"):
        storage.delete(name)
    assert storage.sizes("folder") == {} and storage.sizes("never made") == {}


def test_files_come_and_go_on_disks(disk: Storage) -> None:
    assert disk.is_local
    check_files(pickle.loads(pickle.dumps(disk)))


def test_files_come_and_go_on_s3(store: Storage) -> None:
    assert not store.is_local
    check_files(pickle.loads(pickle.dumps(store)))


@pytest.mark.parametrize("fault", ["slow down", "cut"])
def test_a_busy_store_is_asked_again(store: Storage, s3: S3Stand, fault: str) -> None:
    failures = iter([fault] * 6)
    s3.fault = lambda method, path: next(failures, None) if method != "GET" else None
    store.put(NAME, b"content")
    assert store.get(NAME) == b"content"
    store.delete(NAME)


def test_an_upload_that_fails_for_good_leaves_nothing_and_touches_no_others(s3: S3Stand) -> None:
    store = Storage.open(f"s3://{BUCKET}/cut", patience=Patience(tries=2, first_wait=0.01))
    other = {"Bucket": BUCKET, "Key": f"cut/{NAME}-of-somebody-else"}
    s3.client.create_multipart_upload(**other)
    s3.fault = lambda method, path: "slow down" if method == "PUT" else None
    with pytest.raises(OSError, match=f"{NAME} in 's3://{BUCKET}/cut' cannot be used: the store failed again and"):
        store.put(NAME, bytes(12 << 20))
    s3.fault = lambda method, path: None
    assert store.sizes() == {} and s3.uploads() == [other["Key"]]


def test_uploads_of_dead_processes_are_found_by_their_names(store: Storage, s3: S3Stand) -> None:
    folder = store.root.partition("/")[2]
    for name in (NAME, "part-00000000-000001.parquet", "theirs.parquet"):
        s3.client.create_multipart_upload(Bucket=BUCKET, Key=f"{folder}/{name}")
    store.clean([NAME, "part-00000000-000001.parquet"])
    assert [key for key in s3.uploads() if key.startswith(f"{folder}/")] == [f"{folder}/theirs.parquet"]


def test_a_full_disk_is_not_waited_for_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(fsspec.get_filesystem_class("file")):  # type: ignore[misc]
        def mv(self, *paths: str, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    storage = Storage.open(tmp_path, Full(skip_instance_cache=True))
    with pytest.raises(OSError, match="the disk is full: make room, or write to another place, and run again"):
        storage.put(NAME, b"content")
    assert list(tmp_path.iterdir()) == []


def bad_places(s3: S3Stand, tmp_path: Path) -> dict[str, tuple[Any, Any, str]]:
    (tmp_path / "file").touch()
    return {
        "missing bucket": ("s3://no-such-bucket/x", None, "its bucket does not exist: check the bucket's name"),
        "missing bucket, s3fs": (
            "no-such-bucket/x",
            s3fs.S3FileSystem(endpoint_url=s3.endpoint),
            "its bucket does not exist: check the bucket's name",
        ),
        "unwritable": ("/proc/nothing", None, "check"),
        "a file": (tmp_path / "file" / "folder", None, "it cannot be written: check the folder"),
        "no such scheme": ("nonsense://x/y", None, "cannot be used: Protocol not known: nonsense; use s3://"),
        "no file system": ("x", object(), "filesystem=object is not valid for path='x': give a file system of"),
        "nothing": ("", None, "path='' is not valid: give a folder, such as s3://bucket/folder"),
        "nobody there": (
            f"{BUCKET}/x",
            S3FileSystem(
                endpoint_override="127.0.0.1:9", scheme="http", region="us-east-1", secret_key=SECRET, access_key="a"
            ),
            "check the network and the endpoint",
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "missing bucket",
        "missing bucket, s3fs",
        "unwritable",
        "a file",
        "no such scheme",
        "no file system",
        "nothing",
        "nobody there",
    ],
)
@pytest.mark.timeout(30)
def test_a_place_that_cannot_be_written_is_one_clear_error(kind: str, s3: S3Stand, tmp_path: Path) -> None:
    path, filesystem, words = bad_places(s3, tmp_path)[kind]
    with pytest.raises(ValueError, match=words) as error:
        Storage.open(path, filesystem).check_writable()
    assert SECRET not in str(error.value)


def test_wrong_credentials_are_one_clear_error(s3: S3Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    with pytest.raises(ValueError, match="access was refused: check the credentials"):
        Storage.open(f"s3://{BUCKET}/x").check_writable()


def test_what_may_pass_is_told_from_what_will_not() -> None:
    for words in (
        "AWS Error SLOW_DOWN during PutObject",
        "AWS Error NETWORK_CONNECTION: curlCode: 56",
        "HTTP status 500",
        "part upload for key 'EXPIRED/SIGNATURES/part' in bucket 'b': AWS Error SLOW_DOWN",
    ):
        assert may_pass(OSError(words)), words
    for lasting in (
        OSError("AWS Error ACCESS_DENIED during PutObject"),
        PermissionError("Forbidden"),
        FileNotFoundError("x"),
        OSError(errno.EROFS, "Read-only file system"),
        ValueError("a mistake of ours"),
    ):
        assert not may_pass(lasting), lasting
    assert explain(OSError(errno.ENOSPC, "x")) is not None


def test_patience_ends() -> None:
    tries = []

    def fail() -> None:
        tries.append(1)
        raise OSError("AWS Error SLOW_DOWN")

    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently(fail, QUICK)
    assert len(tries) == QUICK.tries
    tries.clear()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently(fail, Patience(first_wait=0.1, seconds=0.0))
    assert len(tries) == 1


def test_credentials_are_cut_out_of_every_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-environment")
    text = redact(
        "s3://id:canary-address@bucket/x?secret_key=canary-query&region=eu said canary-environment, canary-option",
        ["canary-option"],
    )
    assert "canary" not in text and "region=eu" in text and "bucket/x" in text
    filesystem = S3FileSystem(access_key="a", secret_key="canary-key", session_token="canary-token", region="us-east-1")
    storage = Storage.open("bucket/x", filesystem)
    with caplog.at_level(logging.DEBUG):
        assert "canary" not in repr(storage) + storage._words(OSError("canary-key and canary-token"), "")
    assert "canary" not in caplog.text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "canary-environment"


@pytest.mark.parametrize("path", ["s3://", "s3:///folder"])
def test_an_address_without_a_bucket_is_refused_before_a_store_is_asked(path: str) -> None:
    with pytest.raises(ValueError, match=f"path='{path}' names no bucket: give s3://bucket/folder"):
        Storage.open(path)
