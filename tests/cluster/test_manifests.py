"""Manifests: valid by the schemas of those who read them, of one mind with each other, and without a secret."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydata_llm.redaction import is_telling

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted(CLUSTER.glob("*.yaml"))
KUBERAY = [path for path in MANIFESTS if "ray.io/v1" in path.read_text()]
# KubeRay's CRDs as JSON Schema; they are not kept in the repository.
SCHEMA = Path(os.environ.get("KUBERAY_SCHEMA") or ROOT.parent / "shared/ingredients/kuberay/ray.io_v1.schema.json.gz")
RAY = re.search(r"^ray==(\S+)$", (ROOT / ".ci/constraints.txt").read_text(), re.M)
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)


def name(path: Path) -> str:
    return path.name


def load(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(path.read_text())
    return manifest


def walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, value
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from walk(entry, (*path, str(key)))


def entrypoint(manifest: dict[str, Any]) -> list[str]:
    return shlex.split(manifest.get("entrypoint") or manifest.get("spec", {}).get("entrypoint") or "")


def kuberay_faults(manifest: dict[str, Any]) -> list[str]:
    import jsonschema

    schema = json.loads(gzip.decompress(SCHEMA.read_bytes()))[f"{manifest['apiVersion']}|{manifest['kind']}"]
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


@pytest.mark.skipif(not SCHEMA.exists(), reason="KubeRay's schema is not here; KUBERAY_SCHEMA says where it is")
@pytest.mark.parametrize("path", KUBERAY, ids=name)
def test_kuberay_takes_it_and_would_not_take_a_misspelt_one(path: Path) -> None:
    manifest = load(path)
    assert kuberay_faults(manifest) == []
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    cluster["workerGroupSpecs"][0]["maxReplica"] = 3
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name")
    assert len(kuberay_faults(manifest)) == 2


def test_anyscale_takes_it_and_would_not_take_a_misspelt_one(tmp_path: Path) -> None:
    models = pytest.importorskip("anyscale.job.models", reason="pip install anyscale")
    path = CLUSTER / "anyscale-job.yaml"
    assert models.JobConfig.from_yaml(str(path)).to_dict()["max_retries"] == 2
    for right, wrong in (("max_retries:", "max_retry:"), ("PREFER_SPOT", "CHEAP")):
        (tmp_path / "wrong.yaml").write_text(path.read_text().replace(right, wrong))
        with pytest.raises(TypeError):
            models.JobConfig.from_yaml(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize("path", [path for path in MANIFESTS if entrypoint(load(path))], ids=name)
def test_its_command_is_one_that_the_job_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.s3_batch_job import parse_arguments

    manifest = load(path)
    python, script, *arguments = entrypoint(manifest)
    assert python == "python" and (ROOT / Path(script).relative_to("/opt/raydata_llm")).exists()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    tables = [value for _, value in walk(manifest) if isinstance(value, dict)]
    groups = [group for table in tables for group in table.get("workerGroupSpecs") or table.get("worker_nodes") or ()]
    workers = sum(group.get("replicas", group.get("min_nodes")) for group in groups)
    assert parse_arguments().concurrency == workers, "a GPU for each engine"


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_images_and_versions_are_those_of_the_repository(path: Path) -> None:
    assert RAY is not None and VERSION is not None
    values = [value for path, value in walk(load(path)) if path and path[-1] in ("rayVersion", "ray_version")]
    assert values == [RAY[1]]
    images = {value for path, value in walk(load(path)) if path and path[-1] in ("image", "image_uri")}
    assert images == {f"my-registry/raydata-llm:{VERSION[1]}"}
    assert f"-t my-registry/raydata-llm:{VERSION[1]} " in (CLUSTER / "Dockerfile").read_text()


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_no_secret_stands_in_it(path: Path) -> None:
    manifest = load(path)
    for where, value in walk(manifest):
        if isinstance(value, dict) and is_telling(value.get("name", "")):
            assert "value" not in value, where
        # A toleration's `key` names a taint.
        if where and isinstance(value, str) and where[-3:-2] != ("tolerations",):
            assert not is_telling(where[-1]), where
    assert not re.search(r"(AKIA|hf_)\w{8}", path.read_text())


def test_the_image_holds_what_its_commands_name() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
    assert all((ROOT / part).exists() for line in copied for part in line.split())
    # raydata_llm/ holds links to the rooms beside it.
    rooms = {link.readlink().name for link in (ROOT / "raydata_llm").iterdir() if link.is_symlink()}
    assert rooms < {part for line in copied for part in line.split()}
    [extras] = re.findall(r"'\.\[(.*)\]'", text)
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras.split(","))
