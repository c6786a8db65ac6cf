"""Data larger than the object store goes through, and no process keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.benchmarks.bench_stream import growth, stream
from tests.raydata_llm.tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def test_memory_is_flat_for_data_larger_than_the_object_store(tmp_path: Path) -> None:
    result = stream(6_000, str(save_tokenizer(tmp_path)))
    assert {"driver", "dispatcher", "replica"} <= set(result["tenths"][4])
    assert growth(result["tenths"]) < 60, result
