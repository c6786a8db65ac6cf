"""`make bench`: the correctness gate, then every model and workload, one table and one JSON file.

    make bench [MODEL="llama-3.2-1b qwen3-0.6b"] [WORKLOAD="decode mixed"]
    python -m tests.benchmarks.bench [--model …] [--workload …] [--runs 3] [--profile] [--gate only]

The gate is the `gpu`-marked tests; those with a real model need the demo's (`make demo` fetches it). It refuses to time
where one fails or none ran; what passed once on a GPU is not run again there until a source of the engine, the kernels
or their tests changes. Without a GPU, `bench_cpu` runs instead,
which has a gate of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.table import table
from tests.benchmarks.workloads import SHAPES, WORKLOADS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/benchmarks/results"
# Where a gate that passed is noted.
STAMPS = ROOT / ".pytest_cache/bench"
_GATED = ("engine", "kernels", "tests/engine", "tests/kernels")
_DEFAULT = ("decode", "mixed", "classify", "prefix")


def main() -> int:
    """Gate, time, tell."""
    args = _arguments()
    gpu = _gpu()
    if gpu is None:
        print("no GPU here: timing the CPU engine", flush=True)
        return subprocess.call([sys.executable, "-m", "tests.benchmarks.bench_cpu"])
    gate = pass_gate(gpu)
    print(f"correctness gate on {gpu}: {gate}", flush=True)
    if args.gate == "only":
        return 0
    runs = dict(zip(args.model, args.runs if len(args.runs) > 1 else args.runs * len(args.model), strict=True))
    results: list[dict[str, Any]] = []
    began = time.strftime("%Y-%m-%dT%H%M")
    for model in args.model:
        results += [line | {"gate": gate} for line in time_model(model, runs[model], args)]
        # After each model: a machine that is lent may be taken back.
        out = args.out or RESULTS / f"{began}-{results[0]['commit']}.json"
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"written to {out}")
    return 0


def pass_gate(gpu: str) -> str:
    """What the tests said; exits where they are red."""
    # Tests with a real model share the GPU's memory between few; the kernels' are small.
    workers = ["-n", "8", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    sources = _sources()
    return "; ".join(
        passed_tests(f"{gpu} {sources}", marker, *options)
        for marker, options in (("gpu and not model", workers), ("gpu and model", []))
    )


def passed_tests(state: str, marker: str, *options: str) -> str:
    """What a family of tests says, now or before in the same state; exits if one fails or none is there."""
    stamp = STAMPS / hashlib.sha256(f"{state} {marker}".encode()).hexdigest()[:16]
    if stamp.exists():
        return stamp.read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, *options, "-rfE"]
    ran = subprocess.run(
        [*command, "tests/kernels", "tests/engine"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = ran.stdout.strip().rpartition("\n")[2]
    if ran.returncode != 0 or not re.search(r"\d+ passed", last):
        sys.exit(f"{ran.stdout[-4000:]}{ran.stderr[-2000:]}\ncorrectness gate ({marker}) is red: nothing is timed")
    verdict = f"{marker}: {', '.join(re.findall(r'[0-9]+ (?:passed|skipped)', last))}"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(verdict)
    return verdict


def time_model(model: str, runs: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A model's results, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "tests.benchmarks.bench_engine", "--model", model, "--out", str(out)]
        command += ["--workload", *args.workload, "--runs", str(runs)]
        command += ["--profile"] if args.profile else []
        command += ["--commit", args.commit] if args.commit else []
        subprocess.run(command, cwd=ROOT, check=True)
        results: list[dict[str, Any]] = json.loads(out.read_text())
        return results


def _sources() -> str:
    digest = hashlib.sha256()
    for folder in _GATED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _gpu() -> str | None:
    # In a process of its own: this one is to leave the GPU alone.
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return name or None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=_asked("MODEL", tuple(SHAPES)), choices=SHAPES)
    parser.add_argument("--workload", nargs="+", default=_asked("WORKLOAD", _DEFAULT), choices=WORKLOADS)
    parser.add_argument("--runs", type=int, nargs="+", default=[3], help="timed runs of a workload, or as many a model")
    parser.add_argument("--profile", action="store_true", help="one more run each, for GPU busy and a breakdown")
    parser.add_argument("--gate", choices=("only",), help="run the gate and time nothing")
    parser.add_argument("--commit", help="what to record where there is no git repository")
    parser.add_argument("--out", help="file for the JSON list")
    args = parser.parse_args()
    if len(args.runs) not in (1, len(args.model)):
        asked = " ".join(map(str, args.runs))
        parser.error(f"--runs {asked}: give one number, or one for each of {len(args.model)} models")
    for name, asked, known in (("MODEL", args.model, SHAPES), ("WORKLOAD", args.workload, WORKLOADS)):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            parser.error(f"{name}={unknown[0]!r} is unknown: give some of {', '.join(known)}")
    return args


def _asked(variable: str, default: tuple[str, ...]) -> list[str]:
    return os.environ.get(variable, "").split() or list(default)


if __name__ == "__main__":
    sys.exit(main())
