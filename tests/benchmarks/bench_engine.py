"""Wall time of the engine on fixed work: lists of token ids in, lists of tokens out, both inside the clock.

    python -m tests.benchmarks.bench_engine --model llama-3.2-1b --workload decode mixed [--profile] [--out FILE]

One process a model, dummy weights, greedy, EOS ignored. Start-up is reported apart; then a warm-up of 64 prompts and
16 tokens; before each timed run the prefix cache is reset. The first timed run and the best of three are both reported,
and every run's output counts are asserted. `--profile` adds one more run under torch's profiler, for the GPU's busy
share and a breakdown by kernel.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.garbage_pause import GarbagePause
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.upload import upload
from raydata_llm.engine.worker import Worker
from tests.benchmarks.gpu_profile import profiled
from tests.benchmarks.roofline import bound_s
from tests.benchmarks.table import COLUMNS, table
from tests.benchmarks.workloads import EOS_MAX_TOKENS, NUM_SHARED, SHAPES, WORKLOADS, Work, write_shape


class CompileCounter:
    """Counts what Triton compiles or loads for the first time: in mid-job it stalls the GPU."""

    def __init__(self) -> None:
        self.count = 0
        if torch.cuda.is_available():
            import triton

            triton.knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **_: Any) -> None:
        self.count += 1


class ForcedEnds:
    """Makes each row draw EOS at its length, on the device: the scheduler learns of it as of any other token."""

    def __init__(self, engine: Engine, eos_token_id: int) -> None:
        self._engine = engine
        worker = engine._live_worker()
        assert isinstance(worker, Worker) and worker._runner is not None
        self._sampler = worker._runner._sampler
        self._sample = self._sampler.sample
        self._eos = eos_token_id
        self._lengths: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._first = 0
        setattr(self._sampler, "sample", self._forced)  # noqa: B010

    def set(self, lengths: Sequence[int]) -> None:
        """Output lengths of the requests to come, in order; none: rows end as they like."""
        self._lengths = np.array(lengths, dtype=np.int64)
        self._first = self._engine._next_seq_id

    def _forced(self, logits: torch.Tensor, batch: ScheduledBatch, *arguments: Any) -> Any:
        tokens, logprobs = self._sample(logits, batch, *arguments)
        if len(self._lengths):
            written = batch.sample_positions + 1 - self._engine._scheduler.table.num_prompt[batch.sample_slots]
            # Of rows that have changed hands since (launched ahead of their end) the token is not read.
            row = np.clip(batch.sample_seq_ids - self._first, 0, len(self._lengths) - 1)
            ends = np.flatnonzero(written >= self._lengths[row])
            if len(ends):
                tokens.index_fill_(0, upload(tokens.device, ends)[0], self._eos)
        return tokens, logprobs


class Bench:
    """One engine and the runs on it."""

    def __init__(self, model: str, engine_kwargs: dict[str, Any], sampling: dict[str, Any]) -> None:
        began = time.perf_counter()
        self.model = model
        self.sampling = {"temperature": 0.0} | sampling
        self.compiles = CompileCounter()
        with tempfile.TemporaryDirectory() as folder:
            path = str(write_shape(model, Path(folder)))
            self.engine = Engine(EngineConfig(model=path, load_format="dummy", **engine_kwargs))
        self.ends = ForcedEnds(self.engine, SHAPES[model]["eos_token_id"])
        self.generate(_warm_up(model), forced=False)
        self.started_s = time.perf_counter() - began

    def generate(self, work: Work, *, forced: bool) -> list[list[int]]:
        """Run the work; with `forced`, rows may write EOS_MAX_TOKENS and end by EOS at their lengths."""
        engine = self.engine
        self.ends.set([max_tokens for _, max_tokens in work] if forced else [])
        tokens: dict[int, list[int]] = {}
        rows = iter(enumerate(work))
        with GarbagePause() as garbage:
            while len(tokens) < len(work):
                self._feed(rows, forced=forced)
                tokens |= {int(output.request_id): output.outputs[0].token_ids for output in engine.step()}
                garbage.collect_if_due()
        return [tokens[index] for index in range(len(work))]

    def _feed(self, rows: Iterator[tuple[int, tuple[list[int], int]]], *, forced: bool) -> None:
        # As `LLM.generate` does: the engine works on the first rows while the others are taken in.
        for index, (prompt, max_tokens) in itertools.islice(rows, self.engine.num_wanted()):
            params = self._params(EOS_MAX_TOKENS if forced else max_tokens, ignore_eos=not forced)
            self.engine.add_request(
                Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params, key=index)
            )

    @functools.cache  # noqa: B019 - there is one bench a process
    def _params(self, max_tokens: int, *, ignore_eos: bool) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **self.sampling)

    def measure(self, workload: str, runs: int, *, profile: bool) -> dict[str, Any]:
        """Time a workload; prints its breakdown if asked."""
        work = WORKLOADS[workload](SHAPES[self.model]["vocab_size"])
        forced = workload == "eos"
        lengths = [max_tokens for _, max_tokens in work]
        before, compiles = self.engine.stats(), self.compiles.count
        walls = []
        for _ in range(runs):
            self.engine.reset_prefix_cache()
            begin = time.perf_counter()
            outputs = self.generate(work, forced=forced)
            walls.append(time.perf_counter() - begin)
            assert list(map(len, outputs)) == lengths, "rows came back short"
        after = self.engine.stats()
        steps = after.num_steps - before.num_steps
        wall, asked = min(walls), sum(lengths)
        bound = bound_s(self.model, work, _gpu(), num_shared=NUM_SHARED.get(workload, 0))
        line = {
            "model": self.model,
            "workload": workload,
            "wall_s": round(wall, 3),
            "first_s": round(walls[0], 3),
            "runs_s": [round(one, 3) for one in walls],
            "out_tok_s": round(asked / wall),
            "total_tok_s": round((asked + sum(len(prompt) for prompt, _ in work)) / wall),
            "bound_share": bound and round(bound / wall, 3),
            "steps": steps // runs,
            "mean_decode_rows": round((after.num_decode_rows - before.num_decode_rows) / steps, 1),
            "preemptions": (after.num_preemptions - before.num_preemptions) / runs,
            "compiles": self.compiles.count - compiles,
            "start_s": round(self.started_s, 2),
        }
        if profile:
            self.engine.reset_prefix_cache()
            breakdown = profiled(lambda: self.generate(work, forced=forced))
            print(breakdown.table(), flush=True)
            line["gpu_busy"] = round(breakdown.busy_share, 3)
        return line


def main() -> int:
    """Run the asked workloads on one model; prints a table and writes a JSON list."""
    args = _arguments()
    bench = Bench(args.model, json.loads(args.engine_kwargs), json.loads(args.sampling_params))
    machine = _machine(args.commit) | {"engine_kwargs": args.engine_kwargs, "sampling_params": args.sampling_params}
    results = []
    for name in args.workload:
        results.append(bench.measure(name, args.runs, profile=args.profile) | machine)
        print(json.dumps({key: value for key, value in results[-1].items() if key in COLUMNS}), flush=True)
    if torch.cuda.is_available():
        print(f"most GPU memory allocated {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    print(table(results))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _warm_up(model: str) -> Work:
    rng = np.random.default_rng(99)
    vocab_size = SHAPES[model]["vocab_size"]
    return [(rng.integers(100, vocab_size - 100, size=64).tolist(), 16) for _ in range(64)]


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _machine(commit: str | None) -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": _gpu(),
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
    parser.add_argument("--sampling-params", default="{}", help="JSON, fields of SamplingParams")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of a workload")
    parser.add_argument("--profile", action="store_true", help="one more run, for the breakdown by kernel")
    parser.add_argument("--commit", help="what to record where there is no git repository")
    parser.add_argument("--out", help="file for the JSON list")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
