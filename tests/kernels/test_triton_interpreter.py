"""Runs the Triton kernels' tests under the interpreter, on any machine.

In a process of its own: the interpreter is chosen when triton is first imported, and would keep this one from
compiling.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

# What the interpreter is not for: itself, the compiler's tests, and those that need a real GPU.
OTHERS = {"test_triton_interpreter", "test_triton_aot", "test_triton_gpu"}
FILES = sorted(path for path in Path(__file__).parent.glob("test_triton_*.py") if path.stem not in OTHERS)


def interpreter_works() -> bool:
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= (3, 7) or tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(file: Path) -> None:
    if not interpreter_works():
        pytest.skip("Triton before 3.7 cannot interpret with NumPy 2.4 or later")
    # NumPy's product stands for a GPU's there. OpenBLAS's kernels for Haswell and Zen sum a row in another order where
    # it stands elsewhere in a tile.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-1000:]
