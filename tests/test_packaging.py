"""What a user installs: the wheel built from the sdist holds every room, and imports far from the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("raydata_llm", "engine", "kernels", "cluster")


def modules_of_the_repository() -> set[str]:
    own = {f"raydata_llm/{path.name}" for path in (ROOT / "raydata_llm").glob("*.py")}
    rooms = {f"raydata_llm/{room}/{path.name}" for room in FOLDERS[1:] for path in (ROOT / room).glob("*.py")}
    return own | rooms


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it, made from a copy so that the repository stays clean."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    dist = folder / "dist"
    # Neither --sdist nor --wheel: `build` then makes the wheel from the unpacked sdist.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return dist


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


def test_the_wheel_from_the_sdist_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert modules_of_the_repository() <= names
    assert "raydata_llm/py.typed" in names


def test_the_wheel_holds_nothing_but_the_product(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"raydata_llm"}


def test_the_sdist_names_its_licence(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_wheel_imports_far_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import raydata_llm, raydata_llm.engine.request as m; print(raydata_llm.__file__); print(m.__file__)"
    # -P keeps the current folder off the path; the editable install's finder must lose against PYTHONPATH.
    command = [sys.executable, "-P", "-c", code]
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        assert Path(line).is_relative_to(tmp_path / "site")
