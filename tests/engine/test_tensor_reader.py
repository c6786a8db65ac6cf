"""Tensors arrive byte for byte as safetensors itself reads them, in pieces, by threads that end whatever happens."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raydata_llm.engine import tensor_reader
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.safetensors_file import read_header
from raydata_llm.engine.tensor_reader import read_tensors
from raydata_llm.engine.weights import DTYPES, load_weights, stored_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="GPUs are used on Linux")

CPU = torch.device("cpu")
PIECE = 8192
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", PIECE)


@pytest.fixture(autouse=True)
def no_thread_or_file_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert reading_threads() == []
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    assert not [link for link in links if link.is_symlink() and str(tmp_path) in os.readlink(link)]


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    """Both ways of reading, where the file system of the tests has both."""
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDONLY | (os.O_DIRECT if request.param else 0)))
    except OSError:
        pytest.skip("this file system has no direct reads")
    return bool(request.param)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-weights")]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor whose bytes are drawn, so that they hold NaNs and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=dtype)
    raw = tensor.flatten().view(torch.uint8)
    raw.copy_(torch.randint(0, 2 if dtype == torch.bool else 256, raw.shape, generator=generator, dtype=torch.uint8))
    return tensor


def write(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> Path:
    save_file({name: random_bytes(shape, dtype, index) for index, (name, shape) in enumerate(shapes.items())}, path)
    return path


def read(paths: list[Path], device: str = "cpu", **settings: Any) -> Iterator[tuple[str, torch.Tensor]]:
    listed = (
        (name, stored, DTYPES[stored.dtype])
        for path in paths
        for name, stored in sorted(read_header(path).items(), key=lambda pair: pair[1].start)
    )
    return read_tensors(listed, torch.device(device), **settings)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()


def assert_read_as_by_safetensors(paths: list[Path], device: str = "cpu", **settings: Any) -> None:
    found = list(read(paths, device, **settings))
    expected: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            expected |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert sorted(name for name, _ in found) == sorted(expected)
    for name, tensor in found:
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype), name
        assert tensor.device.type == device and tensor.is_contiguous()
        assert raw(tensor) == raw(expected[name]), name


ODD_SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 7),
    "one": (1,),
    "odd": (3, 5, 7),
    "piece": (PIECE // 2,),
    "pieces": (3 * PIECE // 2,),
    "piece and one": (PIECE // 2 + 1,),
    "many pieces": (333, 257),
    "last and empty": (2, 0),
}


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_odd_shapes_in_several_files_are_those_of_safetensors(
    device: str, direct: bool, tmp_path: Path
) -> None:
    paths = []
    for shard in range(5):
        # A header of another length each time, so that the data start at another place in a block of the disk.
        shapes = {f"{shard} {'x' * 8 * shard} {name}": shape for name, shape in ODD_SHAPES.items()}
        paths.append(write(tmp_path / f"{shard}.safetensors", shapes))
    assert len({read_header(path)[next(iter(read_header(path)))].start for path in paths}) > 1
    assert_read_as_by_safetensors(paths, device, direct=direct)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_of_every_dtype_are_those_of_safetensors(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.safetensors", {"a": (3, 1031), "b": (), "c": (0,), "d": (9, 1, 1031)}, dtype)
    assert_read_as_by_safetensors([path], device)


def test_pieces_of_the_size_in_use_are_put_together(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert tensor_reader.PIECE_BYTES == 8 << 20
    path = write(tmp_path / "weights.safetensors", {"a": (5, 1000, 1031), "b": (17,), "c": (4, 1 << 20)})
    assert_read_as_by_safetensors([path], direct=direct)


def test_tensors_come_in_the_order_in_which_they_lie_in_the_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{shard}", {f"{shard}.{index}": (99, 97) for index in range(30)}) for shard in range(2)]
    headers = [read_header(path) for path in paths]
    in_order = [name for header in headers for name in sorted(header, key=lambda name: header[name].start)]
    assert [name for name, _ in read(paths)] == in_order


def test_reading_keeps_to_its_bound_ahead_of_the_taker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reader, "_AHEAD_BYTES", 5 * PIECE)
    begun: list[str] = []
    begin = tensor_reader._Reader.begin

    def watched_begin(self: Any, name: str, *arguments: Any) -> Any:
        begun.append(name)
        return begin(self, name, *arguments)

    monkeypatch.setattr(tensor_reader._Reader, "begin", watched_begin)
    path = write(tmp_path / "weights.safetensors", {f"{index:02}": (PIECE // 2,) for index in range(20)})
    tensors = read([path])
    for taken in range(1, 21):
        next(tensors)
        assert len(begun) == min(20, taken + 4)
    assert next(tensors, None) is None
    # Of tensors larger than the bound, two are in work.
    begun.clear()
    path = write(tmp_path / "large.safetensors", {f"{index:02}": (5 * PIECE,) for index in range(5)})
    tensors = read([path])
    for taken in range(1, 6):
        next(tensors)
        assert len(begun) == min(5, taken + 1)
    assert next(tensors, None) is None


def test_weights_made_in_inference_mode_are_read_too(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.safetensors", {"a": (333, 257)})
    with torch.inference_mode():
        assert_read_as_by_safetensors([path])


@pytest.mark.parametrize("size", [PIECE, 3 * PIECE + 100, 39 * PIECE])
def test_a_file_that_shrinks_before_it_is_read_is_an_error(size: int, direct: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.safetensors", {f"{index}": (4 * PIECE,) for index in range(5)})
    listed = [(name, stored, torch.bfloat16) for name, stored in read_header(path).items()]
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"weights.safetensors' is damaged: it was cut short to \d+ bytes"):
        list(read_tensors(listed, CPU, direct=direct))


def test_an_error_of_the_disk_reaches_the_taker_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def failing_preadv(file: int, views: list[memoryview], position: int) -> int:
        if position >= 20 * PIECE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, views, position)

    monkeypatch.setattr(os, "preadv", failing_preadv)
    path = write(tmp_path / "weights.safetensors", {f"{index:02}": (PIECE,) for index in range(20)})
    taken: list[str] = []
    with pytest.raises(OSError, match=r"Input/output error: '.*weights.safetensors'") as caught:
        taken.extend(name for name, _ in read([path]))
    assert caught.value.errno == errno.EIO
    assert 8 <= len(taken) < 10  # two pieces each, and a header before them
    assert reading_threads() == []


def test_reads_that_return_less_than_asked_for_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short_preadv(file: int, views: list[memoryview], position: int) -> int:
        return preadv(file, [views[0][:777]], position)

    monkeypatch.setattr(os, "preadv", short_preadv)
    assert_read_as_by_safetensors([write(tmp_path / "weights.safetensors", ODD_SHAPES)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_a_taker_that_stops_early_leaves_no_thread(num_taken: int, device: str, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.safetensors", {f"{index:02}": (40, PIECE) for index in range(20)})
    tensors = read([path], device)
    for _ in range(num_taken):
        next(tensors)
    assert bool(reading_threads()) == bool(num_taken)
    tensors.close()  # type: ignore[attr-defined]
    assert reading_threads() == []
    # So does one that forgets it.
    tensors = read([path], device)
    next(tensors)
    del tensors
    assert reading_threads() == []


def test_a_file_is_read_by_several_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(8, timeout=20)
    preadv = os.preadv

    def meeting_preadv(file: int, views: list[memoryview], position: int) -> int:
        meeting.wait()
        return preadv(file, views, position)

    monkeypatch.setattr(os, "preadv", meeting_preadv)
    path = write(tmp_path / "weights.safetensors", {"a": (8 * PIECE // 2,)})
    stored = read_header(path)["a"]
    # Nine pieces for the eight threads, unless the data begin with a block: the ninth would wait for seven others.
    assert stored.start % PIECE != 0
    shortened = type(stored)(**{**vars(stored), "shape": (7 * PIECE // 2,), "end": stored.end - PIECE})
    ((_, tensor),) = read_tensors([("a", shortened, torch.bfloat16)], CPU)
    with safe_open(path, framework="pt") as file:
        assert raw(tensor) == raw(file.get_tensor("a")[: 7 * PIECE // 2])


def test_parameters_are_listed_without_extras_and_unknown_dtypes_are_named(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    files = ModelFiles.open(str(tiny_model("llama")), hf_overrides={"tie_word_embeddings": True})
    config = files.model_config()
    listed = list(stored_tensors(files.weight_files, config))
    assert {name: stored.shape for name, stored, _ in listed} == config.parameter_shapes()
    starts = [stored.start for _, stored, _ in listed]
    assert starts == sorted(starts)
    path = tmp_path / "weights.safetensors"
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=r"a in weight file '.*weights.safetensors' is F4, which is not read: use one"):
        list(stored_tensors([path], config))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_gets_the_weights_that_a_cpu_gets(dtype: torch.dtype, tiny_model: TinyModel) -> None:
    files = ModelFiles.open(str(tiny_model("qwen2")))
    config: ModelConfig = files.model_config()
    expected = {name: weight.clone() for name, weight in load_weights(files, config, dtype=dtype, device=CPU)}
    found = dict(load_weights(files, config, dtype=dtype, device=torch.device("cuda")))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.is_cuda and raw(weight) == raw(expected[name]), name


@pytest.mark.gpu
def test_memory_that_queued_work_still_reads_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The taker's stream is far behind: every tensor is used, and its memory given to a later one, long after."""
    monkeypatch.setattr(tensor_reader, "_AHEAD_BYTES", 64 * PIECE)
    path = write(tmp_path / "weights.safetensors", {f"{index:03}": (16, PIECE) for index in range(100)})
    kept: dict[str, torch.Tensor] = {}
    cuda: Any = torch.cuda
    for name, tensor in read([path], "cuda"):
        cuda._sleep(20_000_000)
        kept[name] = tensor.clone()
        del tensor
    with safe_open(path, framework="pt") as file:
        for name, tensor in kept.items():
            assert raw(tensor) == raw(file.get_tensor(name)), name


def test_engines_that_load_beside_each_other_read_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 1 << 20)
    path = write(tmp_path / "a.safetensors", {f"weight.{number}": (1024, 1024) for number in range(24)})

    def bytes_read(engines: int, *, direct: bool) -> int:
        """What the disk is asked for, by engines that begin together; the file is dropped from memory first."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        begin = threading.Barrier(engines)

        def load() -> None:
            begin.wait()
            for _ in read([path], direct=direct):
                pass

        threads = [threading.Thread(target=load) for _ in range(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before) * 512

    size = path.stat().st_size
    if bytes_read(1, direct=False) < 0.9 * size:
        pytest.skip("the file cannot be dropped from memory, or the system does not count what is read")
    assert 0.9 * size < bytes_read(2, direct=False) < 1.3 * size
    assert bytes_read(2, direct=True) > 1.9 * size, "this test would see it"
