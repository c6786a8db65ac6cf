"""Engines over several GPUs against one, with the same rows per GPU, and what the ranks' sums cost.

    python -m tests.benchmarks.bench_ranks --out FILE [--model llama-3.1-8b] [--workload decode mixed] [--runs 3]

One process a layout: one GPU, tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=2. Dummy weights,
greedy, EOS ignored; two GPUs get twice the rows, of other tokens. Then the sum of one decode step's hidden states over
two ranks, from a CUDA graph: through NCCL and through symmetric memory, by rows. Its share of a step is twice the
layers times that, over TP2's mean step. `--device cpu --path FOLDER` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import spawn

from raydata_llm import LLM, SamplingParams
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.shard import RankPlace
from tests.benchmarks.workloads import SHAPES, WORKLOADS, Work, write_shape

LAYOUTS: dict[str, dict[str, Any]] = {
    "one GPU": {},
    "TP2": {"tensor_parallel_size": 2},
    "PP2": {"pipeline_parallel_size": 2},
    "DP2": {"data_parallel_size": 2},
}
# Of one GPU's tokens/s, with the same rows per GPU.
WANTED = {"TP2": 1.6, "PP2": 1.8, "DP2": 1.95}
_SUM_ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SUMS_A_GRAPH = 64


def main() -> int:
    """Time what is asked; prints the table and writes a JSON list."""
    args = _arguments()
    if args.layout:
        print(json.dumps(measure(args, args.layout)))
        return 0
    results = [line for layout in LAYOUTS for line in _in_own_process(args, layout)]
    sums = time_sums(_config(args)["hidden_size"], args.device)
    print(table(results, sums, _config(args)["num_hidden_layers"]))
    Path(args.out).write_text(json.dumps({"runs": results, "sums": sums}, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace, layout: str) -> list[dict[str, Any]]:
    """Time one layout on all workloads."""
    copies = 1 if layout == "one GPU" else 2
    with tempfile.TemporaryDirectory() as folder:
        path = args.path or str(write_shape(args.model, Path(folder)))
        settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "device": args.device}
        with LLM(path, **settings, **LAYOUTS[layout]) as llm:
            generate(llm, [(list(range(100, 164)), 16)] * 64)
            return [measure_workload(llm, args, layout, name, copies) for name in args.workload]


def measure_workload(llm: LLM, args: argparse.Namespace, layout: str, name: str, copies: int) -> dict[str, Any]:
    """The best of some runs."""
    work = spread(WORKLOADS[name](_config(args)["vocab_size"])[: args.rows], copies, _config(args)["vocab_size"])
    engine = llm._live_engine()
    before, walls = engine.stats().num_steps, []
    for _ in range(args.runs):
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        generate(llm, work)
        walls.append(time.perf_counter() - begin)
    asked = sum(max_tokens for _, max_tokens in work)
    return {
        "layout": layout,
        "workload": name,
        "rows": len(work),
        "wall_s": round(min(walls), 3),
        "runs_s": [round(wall, 3) for wall in walls],
        "out_tok_s": round(asked / min(walls)),
        "step_s": min(walls) * args.runs / (engine.stats().num_steps - before),
    }


def generate(llm: LLM, work: Work) -> None:
    """Run the work; every row must come back whole."""
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for _, count in work]
    outputs = llm.generate([prompt for prompt, _ in work], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [count for _, count in work]


def spread(work: Work, copies: int, vocab_size: int) -> Work:
    """The work so many times, each time of other tokens: nothing is in the prefix cache that was not before."""
    shifts = range(0, 997 * copies, 997)
    return [([(token + shift) % vocab_size for token in prompt], count) for shift in shifts for prompt, count in work]


def time_sums(hidden_size: int, device: str) -> list[dict[str, Any]]:
    """Seconds of one sum of [rows, hidden_size] over two ranks, by way and rows."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "out.json"))
        spawn(_time_sums_on, (store.port, hidden_size, device, out), nprocs=2)
        timed: list[dict[str, Any]] = json.loads(Path(out).read_text())
        return timed


def _time_sums_on(rank: int, port: int, hidden_size: int, device_type: str, out: str) -> None:
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = TCPStore("127.0.0.1", port, is_master=False)
    parallel = ParallelState(RankPlace(tp_rank=rank, tp_size=2), device, store, 60.0)
    timed = []
    for rows in _SUM_ROWS:
        x = torch.ones((rows, hidden_size), dtype=torch.bfloat16, device=device)
        ways: dict[str, Any] = {"plain": parallel.all_reduce_by_group}
        if parallel.small_sum is not None and parallel.small_sum.takes(x):
            ways["symmetric memory"] = parallel.small_sum
        for way, add in ways.items():
            timed.append({"rows": rows, "way": way, "seconds": _seconds_of(add, x)})
    if rank == 0:
        Path(out).write_text(json.dumps(timed))


def _seconds_of(add: Any, x: torch.Tensor) -> float:
    add(x.clone())
    if not x.is_cuda:
        begin = time.perf_counter()
        for _ in range(3):
            add(x.clone())
        return (time.perf_counter() - begin) / 3
    stream, graph = torch.cuda.Stream(x.device), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(_SUMS_A_GRAPH):
            # In place through NCCL: of ones, that stays finite for 64 sums.
            add(x)
        graph.capture_end()
    seconds = []
    for _ in range(5):
        x.fill_(1)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / _SUMS_A_GRAPH)
    return min(seconds)


def table(results: list[dict[str, Any]], sums: list[dict[str, Any]], num_layers: int) -> str:
    """For tests/benchmarks/README.md."""
    alone = {line["workload"]: line["out_tok_s"] for line in results if line["layout"] == "one GPU"}
    lines = ["| layout | workload | rows | wall s | out tok/s | of one GPU's | wanted |", "|---" * 7 + "|"]
    for line in results:
        gain, wanted = line["out_tok_s"] / alone[line["workload"]], WANTED.get(line["layout"], 1.0)
        cells = (line["layout"], line["workload"], line["rows"], line["wall_s"], f"{line['out_tok_s']:,}")
        lines.append("| " + " | ".join(map(str, cells)) + f" | {gain:.2f} | {wanted} |")
    steps = [line["step_s"] for line in results if line["layout"] == "TP2"]
    lines += ["", "| rows of a sum | way | us | 2 a layer, of TP2's mean step |", "|---" * 4 + "|"]
    for one in sums:
        share = 2 * num_layers * one["seconds"] / steps[0]
        lines.append(f"| {one['rows']} | {one['way']} | {one['seconds'] * 1e6:.1f} | {share:.1%} |")
    return "\n".join(lines)


def _in_own_process(args: argparse.Namespace, layout: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_ranks", "--layout", layout, "--model", args.model]
    command += ["--workload", *args.workload, "--runs", str(args.runs), "--device", args.device, "--out", args.out]
    command += ["--rows", str(args.rows)] if args.rows else []
    command += ["--path", args.path] if args.path else []
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    results: list[dict[str, Any]] = json.loads(ran.stdout.strip().splitlines()[-1])
    print(json.dumps(results), flush=True)
    return results


def _config(args: argparse.Namespace) -> dict[str, Any]:
    if not args.path:
        return SHAPES[args.model]
    config: dict[str, Any] = json.loads(Path(args.path, "config.json").read_text())
    return config


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--path", help="a folder with a config.json, in place of --model")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["decode", "mixed"])
    parser.add_argument("--rows", type=int, help="rows per GPU, of the workload's first")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layout", choices=LAYOUTS, help="this one alone, in this process")
    parser.add_argument("--out", required=True, help="file for the JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
