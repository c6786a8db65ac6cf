"""READMEs: what they link to is there, what they import is ours, and a room's README names its files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import raydata_llm

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / path for path in ("README.md", "CONTRIBUTING.md", "cluster/README.md", "raydata_llm/README.md")]
ROOMS = ("engine", "kernels", "raydata_llm", "cluster")


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", readme.read_text())
    assert [link for link in links if "://" not in link and not (readme.parent / link).exists()] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_works(readme: Path) -> None:
    lines = re.findall(r"^\+?from raydata_llm import (.*)$", readme.read_text(), re.M)
    names = {name.strip() for line in lines for name in line.split(",")}
    assert names <= set(raydata_llm.__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_readme_names_its_files_and_no_others(room: str) -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / room / "README.md").read_text()))
    there = {path.name for path in (ROOT / room).glob("*.py")}
    assert there - named == set(), "not named"
    assert [name for name in named - there if not (ROOT / name).exists()] == [], "named, but not there"


def test_pictures_are_small_and_in_the_repository() -> None:
    pictures = subprocess.run(["git", "ls-files", "*.png"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert all((ROOT / picture).stat().st_size < 150_000 for picture in pictures)
