"""A rehearsal launches nothing and compiles everything, for an sm_90 that this machine need not have."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile", allow_module_level=True)

tl = triton.language
# Not by import statements: where there is no Triton they fail.
module = import_module("raydata_llm.kernels.rehearsal")
decode_inputs_triton = import_module("raydata_llm.kernels.decode_inputs_triton")
rehearsal = module.rehearsal

CPU = torch.device("cpu")


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(x_ptr, out_ptr, BY: tl.constexpr) -> None:  # type: ignore
    place = tl.arange(0, 128)
    tl.store(out_ptr + place, tl.load(x_ptr + place) + BY)


@triton.jit  # type: ignore[untyped-decorator]
def _wrong_kernel(x_ptr) -> None:  # type: ignore[no-untyped-def]
    tl.static_assert(False, "this kernel does not compile")


class Driver:
    """Stands in for a GPU's: kernels are compiled, and their launches noted."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.loaded_by: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=self._load_binary, get_device_properties=lambda device: {"max_shared_mem": 227 * 1024}
        )

    def _load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        self.loaded_by.append(threading.current_thread().name)
        return 1, 1, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: self.launched.append(metadata.name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    """A driver, and kernels that no test has compiled yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = (_add_kernel, _wrong_kernel, decode_inputs_triton._decode_inputs_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()
    result = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", result)
    yield result
    for kernel in kernels:
        kernel.device_caches.clear()


def add(by: int) -> None:
    x = torch.zeros(128)
    _add_kernel[(1,)](x, x, BY=by)


@pytest.fixture
def compiled(driver: Driver) -> Iterator[list[str]]:
    """Names of what was compiled."""
    names: list[str] = []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda *, src, **_: names.append(src.fn.__name__)
    yield names
    triton.knobs.compilation.listener = before


def test_a_rehearsal_launches_nothing_and_compiles_everything_once(driver: Driver, compiled: list[str]) -> None:
    with rehearsal(CPU):
        for by in (1, 2, 1):
            add(by)
        assert not compiled and not driver.launched
    assert compiled == ["_add_kernel", "_add_kernel"] and not driver.launched
    assert all(name.startswith("compile-kernels") for name in driver.loaded_by) and len(driver.loaded_by) == 2
    for by in (1, 2, 1):
        add(by)
    assert len(compiled) == 2 and driver.launched == ["_add_kernel"] * 3
    # What is compiled already is launched, in a rehearsal too.
    with rehearsal(CPU):
        add(2)
    assert len(compiled) == 2 and len(driver.launched) == 4


def test_a_kernel_that_writes_indices_is_launched_in_a_rehearsal(driver: Driver) -> None:
    slots = torch.zeros(2, dtype=torch.int32)
    with rehearsal(CPU):
        decode_inputs_triton.launch_decode_inputs(
            slots, torch.zeros(2, dtype=torch.int64), slots, torch.zeros((2, 4), dtype=torch.int32), 16
        )
        assert driver.launched == ["_decode_inputs_kernel"]
    assert {decode_inputs_triton._decode_inputs_kernel.fn.__name__} == module.WRITES_INDICES


def test_other_threads_launches_are_not_touched(driver: Driver) -> None:
    with rehearsal(CPU):
        other = threading.Thread(target=add, args=(3,))
        other.start()
        other.join()
        assert driver.launched == ["_add_kernel"]


def test_a_kernel_that_does_not_compile_is_an_error_at_the_end(driver: Driver) -> None:
    hook = triton.knobs.runtime.jit_cache_hook
    with pytest.raises(triton.CompilationError, match="this kernel does not compile"), rehearsal(CPU):
        _wrong_kernel[(1,)](torch.zeros(128))
    with pytest.raises(ZeroDivisionError), rehearsal(CPU):
        raise ZeroDivisionError
    assert triton.knobs.runtime.jit_cache_hook is hook
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile-kernels")]


def test_kernels_are_compiled_several_at_a_time(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_count", lambda: 3)
    meeting = threading.Barrier(3, timeout=60)
    load_binary = driver.utils.load_binary
    driver.utils.load_binary = lambda *arguments: (meeting.wait(), load_binary(*arguments))[1]
    with rehearsal(CPU):
        for by in (4, 5, 6):
            add(by)
    assert len(set(driver.loaded_by)) == 3
