"""One `LLM.generate` over many rows: does a step get slower, and what does a row cost the host's memory.

    python -m tests.benchmarks.bench_many [--model qwen3-0.6b] [--rows 20000] [--max-num-seqs 1024] [--out FILE]

Rows of `decode`'s lengths, dummy weights. Steps that only decode are compared by tenths of the run, with steps of the
second tenth that have as many rows, of the same lengths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydata_llm import LLM, SamplingParams
from tests.benchmarks.workloads import SHAPES, write_shape

_PROMPT, _OUTPUT = 64, 512
# What may change a step's time and is not the engine's.
_GPU_STATES = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
# Of a kind, that its median counts.
_FEWEST_STEPS = 5
Kind = tuple[int, int, int]


def main() -> int:
    """Run once; prints and writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-num-seqs", type=int, default=1024, help="rows at once")
    parser.add_argument("--out", help="file for the JSON object")
    args = parser.parse_args()
    result = measure(args.model, args.rows, args.max_num_seqs)
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps([result], indent=1) + "\n")
    return 0


def measure(model: str, num_rows: int, max_num_seqs: int) -> dict[str, Any]:
    """Generate once, with a clock on each step of the engine."""
    rng = np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_shape(model, Path(folder)))
        llm = LLM(path, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=max_num_seqs)
    prompts = rng.integers(100, 20000, size=(num_rows, _PROMPT)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True)
    llm.generate(prompts[:64], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    llm.reset_prefix_cache()
    steps = clock_steps(llm._live_engine())
    before = _resident_bytes()
    with gpu_states() as states:
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        wall = time.perf_counter() - began
    assert [len(output.outputs[0].token_ids) for output in outputs] == [_OUTPUT] * num_rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": model,
        "rows": num_rows,
        "max_num_seqs": max_num_seqs,
        "wall_s": round(wall, 2),
        "out_tok_s": round(num_rows * _OUTPUT / wall),
        "steps": len(steps),
        "decode_step_over_second_tenth": step_ratios(steps),
        "decode_rows_by_tenth": [float(np.median([step.decode_rows for step in tenth])) for tenth in tenths(steps)],
        "gpu_by_tenth": {name: _by_tenth(states, began, wall, name) for name in _GPU_STATES},
        "host_kb_per_row": round((peak - before) / num_rows / 1000, 2),
        "host_rss_before_gb": round(before / 1e9, 2),
        "host_rss_peak_gb": round(peak / 1e9, 2),
    }


@contextmanager
def gpu_states() -> Iterator[list[dict[str, float]]]:
    """The GPU's clocks, power and temperature once a second, with the time, as nvidia-smi tells them."""
    states: list[dict[str, float]] = []
    query = f"--query-gpu={','.join(_GPU_STATES)}"
    with subprocess.Popen(
        ["nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits", "--loop=1"], stdout=subprocess.PIPE, text=True
    ) as process:

        def read() -> None:
            for line in process.stdout or ():
                values = map(float, line.split(","))
                states.append({"time": time.perf_counter(), **dict(zip(_GPU_STATES, values, strict=True))})

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield states
        finally:
            process.kill()
            reader.join()


def _by_tenth(states: list[dict[str, float]], began: float, wall: float, name: str) -> list[float]:
    tenths: list[list[float]] = [[] for _ in range(10)]
    for state in states:
        if began <= state["time"] < began + wall:
            tenths[int((state["time"] - began) / wall * 10)].append(state[name])
    return [round(float(np.mean(tenth)), 1) if tenth else float("nan") for tenth in tenths]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@dataclass(frozen=True)
class Step:
    """A step of the engine: when it ended, and what it was about."""

    end: float
    decode_rows: int
    tokens: int
    kv_usage: float


def clock_steps(engine: Any) -> list[Step]:
    """The engine's steps from now on."""
    steps: list[Step] = []
    step = engine.step

    def clocked() -> Any:
        before = engine.stats()
        finished = step()
        after = engine.stats()
        rows = after.num_decode_rows - before.num_decode_rows
        tokens = after.num_computed_tokens - before.num_computed_tokens
        steps.append(Step(time.perf_counter(), rows, tokens, after.kv_usage))
        return finished

    engine.step = clocked
    return steps


def tenths(steps: list[Step]) -> list[list[Step]]:
    """The steps by when they ended, in tenths of the time from the first to the last."""
    tenth_s = (steps[-1].end - steps[0].end) / 10 + 1e-9
    parts: list[list[Step]] = [[] for _ in range(10)]
    for step in steps:
        parts[int((step.end - steps[0].end) / tenth_s)].append(step)
    return parts


def step_ratios(steps: list[Step]) -> list[float]:
    """For each tenth of the run: the time of its pure decode steps over that of the second tenth's like them.

    Like each other are steps of the same kind (`_kinds`). A kind counts by how often both tenths have it, with its
    median time; NaN where they have none in common.
    """
    kinds = dict(zip(steps, _kinds(steps), strict=True))
    spent: list[dict[Kind, list[float]]] = []
    for tenth in tenths(steps):
        times = defaultdict(list)
        for before, step in itertools.pairwise(tenth):
            kind = kinds[step]
            if kind is not None:
                times[kind].append(step.end - before.end)
        spent.append(times)
    return [round(_ratio(times, spent[1]), 4) for times in spent]


def _kinds(steps: list[Step]) -> list[Kind | None]:
    """Of pure decode steps: rows (by 32, as graphs are), KV held (by 5 %), and how many such steps came before.

    KV is held in blocks: rows of one length hold as much of it for 64 steps, which take longer and longer. None of
    steps with prompts, and of those right after, as the engine waits for a step while the next one is under way.
    """
    kinds: list[Kind | None] = []
    age = 0
    for step in steps:
        age = age + 1 if step.decode_rows == step.tokens else 0
        kind = round(step.decode_rows / 32), round(step.kv_usage * 20), age // 8
        kinds.append(kind if age > 2 else None)
    return kinds


def _ratio(times: dict[Kind, list[float]], reference: dict[Kind, list[float]]) -> float:
    common = [kind for kind in times if len(times[kind]) >= _FEWEST_STEPS and len(reference[kind]) >= _FEWEST_STEPS]
    weights = [min(len(times[kind]), len(reference[kind])) for kind in common]
    ratios = [float(np.median(times[kind]) / np.median(reference[kind])) for kind in common]
    return float(np.average(ratios, weights=weights)) if common else float("nan")


if __name__ == "__main__":
    sys.exit(main())
