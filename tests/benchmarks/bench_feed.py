"""How full the pipeline keeps its engines: a fake engine that only takes time, under everything real above it.

    .venv/bin/python -m tests.benchmarks.bench_feed [--cases one-block four-slow ...]

The worst case for a batch barrier: 20 ms a token, rows of 20 tokens but 400 in every 16th, an engine of 256 slots, all
settings at their defaults. 4096 such rows are 14.0 s of work for one engine; four share it in 8, which the longest row
takes alone. `wide` is an engine of 1024 slots, a GPU's default. Engines take 15 s to start, but 2 in `soon` and none in
`at-once`. Printed per case, as JSON: seconds from the first replica's readiness to the last row, the floor, and the
mean share of slots with a row until the last row has started. It fails when a case misses its target.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raydata_llm import EngineProcessorConfig
from raydata_llm.processor import Processor
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.slot_engine import SlotEngineSettings, start_slot_engine
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SETTINGS = SlotEngineSettings()
LONG, SHORT, EVERY = 400, 20, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job; `seconds` and `share` are its targets.

    An engine of a real model takes longer than `start_seconds` to load; the first rows are tokenised meanwhile.
    """

    rows: int = 4096
    blocks: int = 128
    replicas: int = 1
    slots: int = SETTINGS.max_num_seqs
    seconds: float
    share: float | None = None
    start_seconds: float = 15.0
    late: dict[int, float] = field(default_factory=dict)
    slow: dict[int, float] = field(default_factory=dict)


CASES = {
    "one": Case(seconds=15, share=0.95),
    "one-block": Case(blocks=1, seconds=15, share=0.95),
    "40000-rows": Case(rows=40_000, seconds=145, share=0.95),
    "wide": Case(rows=20_000, slots=1024, seconds=25, share=0.95),
    "soon": Case(seconds=15, share=0.95, start_seconds=2),
    "at-once": Case(seconds=15, start_seconds=0),
    "four": Case(replicas=4, seconds=10),
    "four-late": Case(replicas=4, seconds=12, late={3: 3.0}),
    "four-slow": Case(replicas=4, seconds=17, slow={3: 2.0}),
}


def run(case: Case, model: str, folder: Path) -> dict[str, Any]:
    """Run one case; returns its figures."""
    for name in ("log", "ranks"):
        (folder / name).mkdir(parents=True)
    settings = SlotEngineSettings(max_num_seqs=case.slots, log=folder / "log", start_seconds=case.start_seconds)
    of_engine = {"max_num_seqs": case.slots} if case.slots != SETTINGS.max_num_seqs else {}
    processor = Processor(
        EngineProcessorConfig(model_source=model, concurrency=case.replicas, engine_kwargs=of_engine),
        ask,
        lambda row: {"id": row["id"], "tokens": row["num_generated_tokens"]},
        engine_factory=start_slot_engine(settings, folder / "ranks", late=case.late, slow=case.slow),
    )
    started = time.time()
    rows = processor(ray.data.range(case.rows, override_num_blocks=case.blocks)).iter_rows()
    lengths = {row["id"]: row["tokens"] for row in rows}
    ended = time.time()
    assert lengths == {row: tokens(row) for row in range(case.rows)}, "every row once, as long as it asked to be"
    files = sorted((folder / "log").iterdir())
    logs = [np.array([json.loads(line) for line in file.read_text().splitlines()]) for file in files]
    ready = float(min(log[0, 0] for log in logs))
    return {
        "seconds": round(ended - ready, 2),
        "floor": round(floor(case), 2),
        "share": round(share_of_slots(logs, ready, case), 3),
        "before_ready": round(ready - started, 2),
        "rows_of_replica": [int(log[-1, 2]) for log in logs],
    }


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """A short chat."""
    return {
        "messages": [{"role": "user", "content": f"{row['id']} ** 3 = ?"}],
        "sampling_params": {"temperature": 0.3, "max_tokens": tokens(row["id"])},
    }


def tokens(row: int) -> int:
    """The tokens of a row."""
    return LONG if row % EVERY == 0 else SHORT


def floor(case: Case) -> float:
    """The time that the engines need at least."""
    work = sum(map(tokens, range(case.rows))) * SETTINGS.token_seconds
    return max(work / case.slots / case.replicas, LONG * SETTINGS.token_seconds)


def share_of_slots(logs: list[Any], ready: float, case: Case) -> float:
    """Mean share of the slots of all engines that hold a row, until the last row has started."""
    moments = np.unique(np.concatenate([log[:, 0] for log in logs]))
    states = []  # [running, started] of each engine at each moment
    for log in logs:
        index = np.searchsorted(log[:, 0], moments, side="right") - 1
        states.append(np.where(index[:, None] >= 0, log[index, 1:], 0))
    running, started = np.sum(states, axis=0).T
    until = int(np.searchsorted(started, case.rows))
    held = float((running[:until] * np.diff(moments[: until + 1])).sum())
    return held / float(moments[until] - ready) / case.slots / len(logs)


def main() -> int:
    """Run the cases; returns how many missed their targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ray_session():
        model = str(save_tokenizer(Path(folder)))
        run(Case(rows=256, seconds=0), model, Path(folder) / "warm-up")  # starts Ray's workers, which takes seconds
        for name in parser.parse_args().cases:
            case = CASES[name]
            figures = run(case, model, Path(folder) / name)
            met = bool(figures["seconds"] <= case.seconds and figures["share"] >= (case.share or 0))
            missed += not met
            print(json.dumps({"case": name, **figures, "target": case.seconds, "met": met}), flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
