"""Memory of a job whose data is larger than the object store and larger than what any process should hold.

    python -m tests.benchmarks.bench_stream [--gigabytes 2] [--store-megabytes 200]

Rows of 20 kB of random text go through an engine that takes a millisecond a step, and are dropped as they come out.
Printed as JSON: the resident memory (MB) of the driver, the dispatcher and the replica at each tenth of the rows. It
fails when one of them grows by more than 150 MB from the second tenth to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
from ray import cloudpickle

from raydata_llm import EngineProcessorConfig
from raydata_llm.engine.engine_thread import EngineThread
from raydata_llm.processor import Processor
from raydata_llm.replica import RunningEngine
from tests.raydata_llm.slot_engine import SlotEngine, SlotEngineSettings
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

ROW_BYTES = 20_000
_GROWTH_MB = 150


def start(model_source: str, engine_kwargs: Mapping[str, Any]) -> tuple[RunningEngine, Mapping[str, Any]]:
    """A quick engine."""
    engine: Any = SlotEngine(SlotEngineSettings(token_seconds=0.001))
    return cast(RunningEngine, EngineThread(engine)), {}


def fill(row: dict[str, Any]) -> dict[str, Any]:
    """A row of text of its own."""
    return {"id": row["id"], "text": os.urandom(ROW_BYTES // 2).hex()}


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """The first words of the text."""
    return {"prompt": row["text"][:400], "sampling_params": {"max_tokens": 4}}


def stream(rows: int, model: str) -> dict[str, Any]:
    """Run the rows through; returns memory over time."""
    config = EngineProcessorConfig(model_source=model)
    source = ray.data.range(rows, override_num_blocks=max(1, rows // 500)).map(fill)
    tenths: list[dict[str, int]] = []
    seen = 0
    began = time.monotonic()
    for batch in Processor(config, ask, engine_factory=start)(source).iter_batches(batch_size=256):
        seen += len(batch["id"])
        if seen >= rows * (len(tenths) + 1) // 10:
            tenths.append({"rows": seen, "seconds": int(time.monotonic() - began), **memory()})
    assert seen == rows
    return {"rows": rows, "gigabytes": round(rows * ROW_BYTES / 1e9, 2), "tenths": tenths}


def memory() -> dict[str, int]:
    """Resident memory, without the pages shared through the object store, in MB."""
    from ray._private.state import actors

    names = {"Replica": "replica", "MapWorker(MapBatches(Dispatcher))": "dispatcher"}
    found = {"driver": _own_memory(os.getpid())}
    for actor in actors().values():
        name = names.get(actor["ActorClassName"])
        if name is not None and actor["State"] == "ALIVE":
            found[name] = _own_memory(actor["Pid"])
    return found


def _own_memory(pid: int) -> int:
    _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") // 1_000_000


def growth(tenths: list[dict[str, int]]) -> int:
    """How much the largest grower grew from the second tenth to the last that it saw, in MB."""
    names = ("driver", "dispatcher", "replica")  # the last two end a little before the last rows are read
    seen = {name: [tenth[name] for tenth in tenths[1:] if name in tenth] for name in names}
    return max(values[-1] - values[0] for values in seen.values())


def main() -> int:
    """Run it; returns 1 when memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--store-megabytes", type=int, default=200)
    arguments = parser.parse_args()
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=arguments.store_megabytes << 20,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        result = stream(int(arguments.gigabytes * 1e9 / ROW_BYTES), str(save_tokenizer(Path(folder))))
    print(json.dumps({**result, "growth_mb": growth(result["tenths"])}))
    return int(growth(result["tenths"]) > _GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main())
