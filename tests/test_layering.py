"""The house rules that a linter cannot state: who imports whom, and one word for one thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "engine", "cluster")

MAY_IMPORT = {
    "kernels": {"torch", "triton", "raydata_llm.kernels"},
    "engine": {
        "numpy",
        "torch",
        "safetensors",
        "gguf",
        "llguidance",
        "transformers",
        "raydata_llm.engine",
        "raydata_llm.kernels",
    },
    "cluster": {"ray", "raydata_llm.cluster"},
}

# Words that have a settled other name. (`item` and `sample` for a row have other, honest uses: reviewers look.)
BANNED_WORDS = {
    "req": "request",
    "seq_group": "sequence",
    "response": "request output",
    "cached_len": "num_computed_tokens",
    "tick": "step",
    "model_input": "forward batch",
    "page": "block",
    "out_loc": "slot_mapping",
    "allocator": "block manager",
    "executor": "model runner",
    "instance": "replica",
    "bump": "preempt",
    "cancel": "abort",
    "server": "replica",
    "impl": "op",
    "naive": "<op>_ref",
    "n_head": "num_heads",
}


def python_files(folder: str) -> list[Path]:
    """A room's own Python files (the product's folder holds the rooms as links, which are not followed)."""
    return sorted(path for path in (ROOT / folder).glob("*.py"))


def product_files() -> list[Path]:
    return [path for folder in ("raydata_llm", *ROOMS) for path in python_files(folder)]


def repository_files() -> list[Path]:
    others = [path for folder in ("tests", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    return product_files() + others


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Every (line, module) that a file imports, inside functions too; `.` stands for a relative import."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else (node.module or "")


def package_of(module: str) -> str:
    """`numpy.linalg` -> `numpy`; `raydata_llm.engine.request` -> `raydata_llm.engine`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "raydata_llm" else parts[0]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in python_files(room)
        for line, module in imported_modules(path)
        if package_of(module) not in MAY_IMPORT[room] and package_of(module) not in sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_imported_by_their_full_name_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in repository_files()
        for line, module in imported_modules(path)
        if module == "." or package_of(module) in ROOMS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_linked_namespace(room: str) -> None:
    link = ROOT / "raydata_llm" / room
    assert link.is_symlink() and str(link.readlink()) == f"../{room}"
    assert not (ROOT / room / "__init__.py").exists(), f"{room}/__init__.py would shadow a top-level `{room}` package"


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [str(path) for path in product_files() if path.name in drawers]


def defined_names(path: Path) -> Iterator[tuple[int, str]]:
    """Every (line, name) that a file defines: modules, classes, functions, arguments, variables and attributes."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def snake(name: str) -> str:
    """`ModelInput` -> `_model_input_`, so that a word is found between underscores."""
    return "_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_") + "_"


def test_each_thing_has_one_word() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}: say {better}"
        for path in product_files()
        for line, name in defined_names(path)
        for word, better in BANNED_WORDS.items()
        if f"_{word}_" in snake(name) or f"_{word}s_" in snake(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_product_loads_no_heavy_library() -> None:
    """The driver describes the job; torch, transformers and Ray are loaded where they are used."""
    code = "import sys, raydata_llm; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
