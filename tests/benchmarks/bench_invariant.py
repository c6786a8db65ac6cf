"""The price of `batch_invariant`: the same work with it and without, engines in turn, each in a process of its own.

    python -m tests.benchmarks.bench_invariant [--model qwen3-0.6b llama-3.2-1b] [--workload decode mixed] [--out FILE]

Needs a GPU. Dummy weights, temperature 1 unless --greedy; three timed runs after a warm-up, the best is compared. Two
engines off are measured: as it comes, and without prefixes attended to together, which `batch_invariant` does not do
either. Options of bench_engine.py do the measuring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.workloads import SHAPES, WORKLOADS

WAYS: dict[str, dict[str, bool]] = {
    "off": {},
    "off, no cascade": {"disable_cascade_attn": True},
    "on": {"batch_invariant": True},
}


def main() -> int:
    """Measure; prints a table and writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=["qwen3-0.6b", "llama-3.2-1b"])
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["decode", "mixed"])
    parser.add_argument("--runs", type=int, default=3, help="timed runs of a workload")
    parser.add_argument("--greedy", action="store_true", help="temperature 0")
    parser.add_argument("--out", help="file for the JSON list")
    args = parser.parse_args()
    results = []
    for model in args.model:
        for way in WAYS:
            lines = measure(model, way, args.workload, runs=args.runs, temperature=0.0 if args.greedy else 1.0)
            results += [line | {"batch_invariant": way} for line in lines]
    print(price_table(results))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(model: str, way: str, workloads: list[str], *, runs: int, temperature: float) -> list[dict[str, Any]]:
    """A line a workload, from an engine of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "tests.benchmarks.bench_engine", "--model", model, "--runs", str(runs)]
        command += ["--workload", *workloads, "--out", str(out), "--engine-kwargs", json.dumps(WAYS[way])]
        command += ["--sampling-params", json.dumps({"temperature": temperature})]
        subprocess.run(command, check=True)
        lines: list[dict[str, Any]] = json.loads(out.read_text())
    return lines


def price_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line each, with its time beside that of the engine as it comes."""
    base = {(one["model"], one["workload"]): one["wall_s"] for one in results if one["batch_invariant"] == "off"}
    lines = ["| model | workload | batch_invariant | wall s | out tok/s | times off |", "|---|---|---|---|---|---|"]
    for one in results:
        ratio = one["wall_s"] / base[one["model"], one["workload"]]
        cells = (one["model"], one["workload"], one["batch_invariant"], f"{one['wall_s']:.2f}", f"{one['out_tok_s']:,}")
        lines.append("| " + " | ".join(cells) + f" | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
