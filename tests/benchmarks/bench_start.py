"""From a process's start to the first tokens of a batch of 64 rows: once with empty kernel caches, then with warm ones.

    python -m tests.benchmarks.bench_start --model llama-3.2-1b [--out FILE]

Dummy weights, made on the device. The clock runs in the parent, from before the process is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.workloads import SHAPES, write_shape

_FIRST_TOKENS = "first tokens"


def main() -> int:
    """Start twice; prints what passed when."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--out", help="file for the JSON list")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        start(args.child)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_shape(args.model, Path(folder)))
        environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton", "PYTHONUNBUFFERED": "1"}
        results = [measure(args.model, path, environment, caches) for caches in ("cold", "warm")]
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(model: str, path: str, environment: dict[str, str], caches: str) -> dict[str, object]:
    """Run a process to its first tokens; the seconds at which it said what it had done."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_start", "--model", model, "--child", path]
    began = time.perf_counter()
    reached: dict[str, float] = {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            reached[line.strip()] = round(time.perf_counter() - began, 2)
    assert process.returncode == 0 and _FIRST_TOKENS in reached, f"the process ended with {process.returncode}"
    result = {"model": model, "caches": caches, "start_s": reached[_FIRST_TOKENS], "reached_s": reached}
    print(json.dumps(result), flush=True)
    return result


def start(path: str) -> None:
    """The process that is timed: says what it has done, a line each."""
    import numpy as np

    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_config import EngineConfig
    from raydata_llm.engine.request import Request
    from raydata_llm.engine.sampling_params import SamplingParams

    print("imported")
    engine = Engine(EngineConfig(model=path, load_format="dummy"))
    print("engine made")
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    rng = np.random.default_rng(0)
    for index in range(64):
        prompt = rng.integers(100, 20000, size=64).astype(np.int32)
        engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params))
    while engine.has_unfinished():
        engine.step()
    print(_FIRST_TOKENS)
    os._exit(0)  # what is freed at the end is not part of it


if __name__ == "__main__":
    sys.exit(main())
