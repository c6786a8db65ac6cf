"""The benchmark of loading measures what it says, on a small checkpoint and a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from tests.benchmarks.bench_load import cached_bytes, drop, main, scaled_config, write_files

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="GPUs are used on Linux")


def test_the_benchmark_runs_on_a_cpu_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["--folder", str(tmp_path), "--gb", "0.1", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert abs(result["gb"] - 0.1) < 0.02
    assert set(result["disk_gb_s"]) == {"direct", "buffered", "buffered x8", "direct x8"}
    for load in (result["load"], result["load_direct"]):
        assert load["gb_s"] == pytest.approx(result["gb"] / load["seconds"], rel=0.02)
        assert load["ratio"] == pytest.approx(load["gb_s"] / max(result["disk_gb_s"].values()), rel=0.02)
    assert os.listdir(tmp_path) == ["out.json"]


def test_the_checkpoint_is_one_that_the_engine_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.bench_load._SHARD_BYTES", 30_000_000)
    settings = scaled_config(0.1)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    num_bytes = write_files(tmp_path, ModelConfig.from_hf(settings), tmp_path / "probe", 1 << 20)
    files = ModelFiles.open(str(tmp_path))
    assert len(files.weight_files) > 2
    assert sum(path.stat().st_size for path in files.weight_files) == num_bytes
    files.check_weights(files.model_config())
    assert (tmp_path / "probe").stat().st_size == 1 << 20


def test_the_full_size_is_the_models_own() -> None:
    assert scaled_config(16.0)["num_hidden_layers"] == 32


def test_what_is_in_the_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    path.read_bytes()
    assert cached_bytes(path) == 8 << 20
    # A file system that lives in memory keeps its files there.
    assert drop([path]) in (0.0, 1.0)
