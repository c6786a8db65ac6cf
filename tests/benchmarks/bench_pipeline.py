"""What a pipeline costs beside its engine: ours and Ray Data LLM's, on the same chats, with engines that take no time.

    python -m tests.benchmarks.bench_pipeline --peer ../shared/bench/ray_peer [--peer-python PYTHON] [--rounds 3]

Each runs as a process of its own on a Ray of its own, taking turns. Printed per run, as JSON: seconds in all from the
dataset's making to the last row, seconds to the first row, and rows a second between the 10th and the 90th per cent of
the rows; then the medians and their ratios. `bare` is Ray Data's own floor: three operators, the middle one an actor,
that give back what they get. `--peer` is a folder with a `fake` package that stands in for vLLM (it
answers at once) and a tokenizer in `model`; `--peer-python` has Ray Data LLM's needs and no torch. The peer is given 12
logical CPUs, as its actors wait for ever with 2; the machine has what it has. Without `--peer` ours runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS = 10_000


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """A short chat."""
    return {
        "messages": [{"role": "user", "content": f"{row['id']} ** 3 = ?"}],
        "sampling_params": {"temperature": 0.3, "max_tokens": 16, "detokenize": False},
    }


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept."""
    return {"id": row["id"], "t": row["time_taken_llm"]}


def start(num_cpus: int, num_gpus: int = 0) -> Any:
    """A Ray of this process; returns `ray`."""
    import ray

    # Workers inherit this process's environment; a runtime_env would cost each of them a second more to start.
    ray.init("local", num_cpus=num_cpus, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def ours(model: str, num_cpus: int) -> tuple[Any, Any]:
    """This package's pipeline."""
    ray = start(num_cpus)
    from raydata_llm import EngineProcessorConfig
    from raydata_llm.processor import Processor
    from tests.raydata_llm.slot_engine import SlotEngineSettings, start_slot_engine

    factory = start_slot_engine(SlotEngineSettings(max_num_seqs=1024, token_seconds=0))
    config = EngineProcessorConfig(model_source=model, engine_kwargs={"max_num_seqs": 1024, "device": "cpu"})
    return ray, Processor(config, ask, answer, engine_factory=factory)


class Nothing:
    """An actor's function that gives its block back."""

    def __call__(self, table: Any) -> Any:
        return table


def nothing(table: Any) -> Any:
    """A task's function that gives its block back."""
    return table


def bare(model: str, num_cpus: int) -> tuple[Any, Any]:
    """The floor: the same three operators, doing nothing."""
    ray = start(num_cpus)

    def pipeline(dataset: Any) -> Any:
        options = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
        pool = ray.data.ActorPoolStrategy(size=1)
        return (
            dataset.map_batches(nothing, **options)
            .map_batches(Nothing, compute=pool, num_cpus=0, **options)
            .map_batches(nothing, **options)
        )

    return ray, pipeline


def peer(model: str, num_cpus: int) -> tuple[Any, Any]:
    """Ray Data LLM's, with its defaults."""
    ray = start(num_cpus, num_gpus=1)  # its engine asks for one
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(model_source=model, concurrency=1)
    return ray, build_processor(config, preprocess=ask, postprocess=answer)


def timed(ray: Any, processor: Any, blocks: int) -> dict[str, float]:
    """Run the rows through."""
    began = time.perf_counter()
    times, ids = [], set()
    for row in processor(ray.data.range(ROWS, override_num_blocks=blocks or None)).iter_rows():
        times.append(time.perf_counter() - began)
        ids.add(row["id"])
    assert ids == set(range(ROWS)) and len(times) == ROWS
    span = times[ROWS * 9 // 10] - times[ROWS // 10]
    return {
        "seconds": round(times[-1], 2),
        "first": round(times[0], 2),
        "rows_per_second": round(0.8 * ROWS / span),
    }


def measure(kind: str, python: str, path: str, num_cpus: int, common: list[str]) -> dict[str, float]:
    """One run in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "F_LOG": os.devnull,  # of the peer's fake engine
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # A process that must compile what it imports starts three times slower: neither side is measured so.
        "PYTHONDONTWRITEBYTECODE": "",
    }
    command = [python, __file__, "--run", kind, "--num-cpus", str(num_cpus), *common]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"pipeline": kind, "CPUs": num_cpus, **figures, "load": os.getloadavg()[0]}), flush=True)
    return figures


PIPELINES = {"bare": bare, "ours": ours, "peer": peer}


def main() -> None:
    """Measure, taking turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-cpus", type=int, help="of every Ray, instead of 2 (the peer's: 12)")
    parser.add_argument("--blocks", type=int, default=40, help="of the dataset; 0: as many as Ray Data makes of it")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=PIPELINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(timed(*PIPELINES[arguments.run](arguments.model, arguments.num_cpus), arguments.blocks)))
        return
    root = str(Path(__file__).parents[2])
    model = str((arguments.peer / "model").resolve()) if arguments.peer else arguments.model
    sides = {"bare": (sys.executable, root, 2), "ours": (sys.executable, root, 2)}
    if arguments.peer:
        sides["peer"] = (arguments.peer_python, str((arguments.peer / "fake").resolve()), 12)
    common = ["--model", str(model), "--blocks", str(arguments.blocks)]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in sides}
    for _ in range(arguments.rounds):
        for kind, (python, path, num_cpus) in sides.items():
            runs[kind].append(measure(kind, python, path, arguments.num_cpus or num_cpus, common))
    medians = {kind: {name: statistics.median(run[name] for run in of) for name in of[0]} for kind, of in runs.items()}
    own = medians.pop("ours")
    ratios = {kind: {name: round(own[name] / value, 2) for name, value in of.items()} for kind, of in medians.items()}
    print(json.dumps({"medians": {"ours": own, **medians}, "ours to": ratios}))


if __name__ == "__main__":
    main()
