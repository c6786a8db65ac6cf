"""Wall time of the engine on fixed work: lists of token ids in, lists of tokens out, both inside the clock.

    python -m tests.benchmarks.bench_engine --model llama-3.2-1b --workload decode mixed [--out results.json]

One process a model, dummy weights, greedy, EOS ignored. Start-up is reported apart; then a warm-up of 64 prompts and
16 tokens; before each timed run the prefix cache is reset. The first timed run and the best of three are both reported,
and every run's output counts are asserted.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from tests.benchmarks.workloads import SHAPES, WORKLOADS, Work, write_shape

RUNS = 3


def main() -> int:
    """Run the asked workloads on one model; prints a line each and writes them as a JSON list."""
    args = _arguments()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_shape(args.model, Path(folder)))
        engine = Engine(EngineConfig(model=model, load_format="dummy", **json.loads(args.engine_kwargs)))
        _generate(engine, _warm_up(args.model))
        started_s = time.perf_counter() - began
        machine = _machine(args.commit)
        results = [_measure(engine, args.model, name, started_s) | machine for name in args.workload]
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _warm_up(model: str) -> Work:
    rng = np.random.default_rng(99)
    vocab_size = SHAPES[model]["vocab_size"]
    return [(rng.integers(100, vocab_size - 100, size=64).tolist(), 16) for _ in range(64)]


def _measure(engine: Engine, model: str, workload: str, started_s: float) -> dict[str, Any]:
    work = WORKLOADS[workload](SHAPES[model]["vocab_size"])
    asked = sum(max_tokens for _, max_tokens in work)
    before = engine.stats()
    walls = []
    for _ in range(RUNS):
        engine.reset_prefix_cache()
        begin = time.perf_counter()
        outputs = _generate(engine, work)
        walls.append(time.perf_counter() - begin)
        assert [len(tokens) for tokens in outputs] == [max_tokens for _, max_tokens in work], "rows came back short"
    after = engine.stats()
    line = {
        "model": model,
        "workload": workload,
        "wall_s": round(min(walls), 3),
        "first_s": round(walls[0], 3),
        "out_tok_s": round(asked / min(walls)),
        "total_tok_s": round((asked + sum(len(prompt) for prompt, _ in work)) / min(walls)),
        "steps": (after.num_steps - before.num_steps) // RUNS,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "start_s": round(started_s, 2),
    }
    print(json.dumps(line), flush=True)
    return line


def _generate(engine: Engine, work: Work) -> list[list[int]]:
    for index, (prompt, max_tokens) in enumerate(work):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        token_ids = np.array(prompt, dtype=np.int32)
        engine.add_request(Request(request_id=str(index), prompt_token_ids=token_ids, sampling_params=params))
    tokens: dict[int, list[int]] = {}
    while engine.has_unfinished():
        tokens |= {int(output.request_id): output.outputs[0].token_ids for output in engine.step()}
    return [tokens[index] for index in range(len(work))]


def _machine(commit: str | None) -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "cpu": platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none",
        "torch": torch.__version__,
        "commit": commit or _output("git", "rev-parse", "--short", "HEAD"),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["decode", "mixed", "classify", "prefix"])
    parser.add_argument("--engine-kwargs", default="{}", help="JSON, fields of EngineConfig")
    parser.add_argument("--commit", help="what to record where there is no git repository")
    parser.add_argument("--out", help="file for the JSON list")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
