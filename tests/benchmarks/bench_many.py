"""One `LLM.generate` over many rows: does a step get slower, and what does a row cost the host's memory.

    python -m tests.benchmarks.bench_many [--model qwen3-0.6b] [--rows 20000] [--out FILE]

Rows of `decode`'s lengths, dummy weights. Steps that only decode are compared by tenths of the run, at equal batch
(the fullest that occurs in both) and context lengths alike, for rows start and end together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from raydata_llm import LLM, SamplingParams
from tests.benchmarks.workloads import SHAPES, write_shape

_PROMPT, _OUTPUT = 64, 512


def main() -> int:
    """Run once; prints and writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--out", help="file for the JSON object")
    args = parser.parse_args()
    result = measure(args.model, args.rows)
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps([result], indent=1) + "\n")
    return 0


def measure(model: str, num_rows: int) -> dict[str, Any]:
    """Generate once, with a clock on each step of the engine."""
    rng = np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_shape(model, Path(folder)))
        llm = LLM(path, load_format="dummy", skip_tokenizer_init=True)
    prompts = rng.integers(100, 20000, size=(num_rows, _PROMPT)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True)
    llm.generate(prompts[:64], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    llm.reset_prefix_cache()
    steps = clock_steps(llm._live_engine())
    before = _resident_bytes()
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    wall = time.perf_counter() - began
    assert [len(output.outputs[0].token_ids) for output in outputs] == [_OUTPUT] * num_rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    means = step_means(steps)
    return {
        "model": model,
        "rows": num_rows,
        "wall_s": round(wall, 2),
        "out_tok_s": round(num_rows * _OUTPUT / wall),
        "steps": len(steps),
        "decode_step_ms_by_tenth": means,
        "ninth_over_second": round(means[8] / means[1], 4),
        "host_kb_per_row": round((peak - before) / num_rows / 1000, 2),
        "host_rss_before_gb": round(before / 1e9, 2),
        "host_rss_peak_gb": round(peak / 1e9, 2),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def clock_steps(engine: Any) -> list[tuple[float, int, int]]:
    """(end, decode rows, all tokens) of each step from now on."""
    steps: list[tuple[float, int, int]] = []
    step = engine.step

    def clocked() -> Any:
        before = engine.stats()
        finished = step()
        after = engine.stats()
        rows = after.num_decode_rows - before.num_decode_rows
        steps.append((time.perf_counter(), rows, after.num_computed_tokens - before.num_computed_tokens))
        return finished

    engine.step = clocked
    return steps


def step_means(steps: list[tuple[float, int, int]]) -> list[float]:
    """Mean milliseconds of the fullest pure decode steps, for each tenth of the run."""
    fullest = max(rows for _, rows, tokens in steps if rows == tokens)
    tenth_s = (steps[-1][0] - steps[0][0]) / 10 + 1e-9
    spent: dict[int, list[float]] = defaultdict(list)
    for (before, *_), (end, rows, tokens) in itertools.pairwise(steps):
        if rows == tokens == fullest:
            spent[int((end - steps[0][0]) / tenth_s)].append((end - before) * 1e3)
    return [round(float(np.mean(spent[tenth])), 3) if spent[tenth] else float("nan") for tenth in range(10)]


if __name__ == "__main__":
    sys.exit(main())
