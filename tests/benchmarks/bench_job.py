"""A whole job beside its engine alone: rows of `mixed`, token ids in Parquet in, Parquet out, one replica.

    python -m tests.benchmarks.bench_job [--model llama-3.2-1b] [--rows 2048] [--engine-kwargs JSON] [--out FILE]

Two processes, one after the other. The job's wall is that of its whole process: imports, Ray, the engine's start, all
rows, the committed files. The engine alone is `LLM.generate` on the same rows, started and warm. What compares with it
is the job's time from its replica's readiness to the last row out of its engine. Dummy weights, greedy, EOS ignored;
every row's number of tokens is checked in both. `at` are moments of the job, in seconds from its process's start.

Before the clock starts a process imports what both import, so that their bytecode is there, as pip leaves it (and their
files in memory): where nothing may be written (`PYTHONDONTWRITEBYTECODE`), each of a job's processes compiles Ray Data
and torch for itself. `--no-imports` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.workloads import SHAPES, mixed, write_shape

IMPORTS = "ray.data, torch, transformers, raydata_llm.engine.engine, raydata_llm.dispatcher, raydata_llm.sink_task"


def main() -> int:
    """Write the rows, run the job, run the engine, compare."""
    args = _arguments()
    if args.part:
        result = {"job": run_job, "engine": run_engine}[args.part](Path(args.folder), json.loads(args.engine_kwargs))
        print(json.dumps(result))
        return 0
    if not args.no_imports:
        subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], env=_environment(), check=True)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), args.model, args.rows)
        job = timed_part("job", folder, args)
        engine = timed_part("engine", folder, args)
    result = compared(job, engine) | {"model": args.model, "rows": args.rows}
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def write_rows(folder: Path, model: str, num_rows: int) -> None:
    """The model's config and a Parquet file of rows: id, token_ids, max_tokens."""
    write_shape(model, folder).rename(folder / "model")
    work = mixed(SHAPES[model]["vocab_size"], num_rows)
    columns = {
        "id": pa.array(range(num_rows)),
        "token_ids": pa.array([prompt for prompt, _ in work], type=pa.list_(pa.int32())),
        "max_tokens": pa.array([max_tokens for _, max_tokens in work]),
    }
    (folder / "rows").mkdir()
    pq.write_table(pa.table(columns), folder / "rows" / "rows.parquet", row_group_size=256)


def timed_part(part: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; its result and its wall time."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_job", "--part", part, "--folder", folder]
    began = time.time()
    done = subprocess.run(
        [*command, "--engine-kwargs", args.engine_kwargs],
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ended = time.time()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    moments = result.pop("moments", {}) | {"exit": ended}
    at = {name: round(moment - began, 2) for name, moment in moments.items()}
    return result | {"at": at, "wall_s": round(ended - began, 2)}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}


def run_job(folder: Path, engine_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The job, as a user would write it."""
    moments = {"main": time.time()}
    import ray.data

    from raydata_llm import EngineProcessorConfig, build_llm_processor, write_parquet

    moments["imported"] = time.time()
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    moments["ray started"] = time.time()
    config = EngineProcessorConfig(
        model_source=str(folder / "model"),
        engine_kwargs={"load_format": "dummy", "skip_tokenizer_init": True} | engine_kwargs,
    )
    processor = build_llm_processor(config, preprocess=_ask, postprocess=_keep)
    dataset = processor(ray.data.read_parquet(str(folder / "rows")))
    called = time.time()
    write_parquet(dataset, str(folder / "out"))
    returned = time.time()
    report = processor.report()
    assert report is not None
    _check(folder, pq.read_table(folder / "out", columns=["id", "num_tokens"]))
    figures = json.loads(report.to_json())
    names = ("seconds", "first_ready", "first_row", "last_row", "idle_share", "starved_share", "mean_batch_size")
    # The run begins when the sink has looked at its folder, a tenth of a second after the call.
    run = {name: called + figures[name] for name in ("first_ready", "first_row", "last_row")}
    moments |= {"sink called": called, **run, "files committed": returned}
    ray_s = moments["ray started"] - moments["imported"]
    kept = {name: figures[name] for name in names}
    return {"ray_s": round(ray_s, 2), **kept, "steady": figures["steady"], "moments": moments}


def run_engine(folder: Path, engine_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same rows through `LLM.generate`."""
    from raydata_llm import LLM, SamplingParams

    llm = LLM(str(folder / "model"), load_format="dummy", skip_tokenizer_init=True, **engine_kwargs)
    rows = pq.read_table(folder / "rows").to_pylist()
    prompts: list[Any] = [{"prompt_token_ids": row["token_ids"]} for row in rows]
    params = [SamplingParams(**_params(row["max_tokens"])) for row in rows]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    generate_s = time.perf_counter() - began
    assert [len(output.outputs[0].token_ids) for output in outputs] == [row["max_tokens"] for row in rows]
    return {"generate_s": round(generate_s, 3), "output_tokens": sum(row["max_tokens"] for row in rows)}


def compared(job: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """The job beside its engine."""
    ready_to_last = job["last_row"] - job["first_ready"]
    return {
        "job_wall_s": job["wall_s"],
        "ready_to_last_row_s": round(ready_to_last, 2),
        "engine_alone_s": engine["generate_s"],
        "job_over_engine": round(ready_to_last / engine["generate_s"], 3),
        "job": job,
        "engine": engine,
    }


def _params(max_tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}


def _ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"tokenized_prompt": row["token_ids"], "sampling_params": _params(row["max_tokens"])}


def _keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "tokens": row["generated_tokens"], "num_tokens": row["num_generated_tokens"]}


def _check(folder: Path, written: pa.Table) -> None:
    asked = pq.read_table(folder / "rows", columns=["id", "max_tokens"])
    wanted = dict(zip(asked["id"].to_pylist(), asked["max_tokens"].to_pylist(), strict=True))
    assert len(written) == len(wanted), f"{len(written)} rows came out of {len(wanted)}"
    assert dict(zip(written["id"].to_pylist(), written["num_tokens"].to_pylist(), strict=True)) == wanted


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--engine-kwargs", default="{}", help="JSON, fields of EngineConfig")
    parser.add_argument("--no-imports", action="store_true", help="do not import everything before the clock starts")
    parser.add_argument("--out", help="file for the JSON")
    parser.add_argument("--part", choices=["job", "engine"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
