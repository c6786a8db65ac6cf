"""Our engine against transformers' `generate`, on the CPU, on the demo's model and prompts, in one run.

    .venv/bin/python -m tests.benchmarks.bench_cpu [--rows 16 64] [--max-tokens 64] [--dtype float32] [--repeat 3]

Both get the same chat prompts as token ids and write exactly --max-tokens tokens a row, greedily; transformers gets
them as one padded batch. The correctness gate comes first: with equal weights, both must write the same tokens. The two
take turns, so that a busy machine slows both, and each's best run counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait lose most of the time on a machine that does anything else: both contenders sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from examples.demo_assets import model_path, prompts
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.tokenizer import encode_chat, load_tokenizer

QUESTION = "Say in one sentence what this function should do.\n\n"


def main() -> int:
    """Run the gate, then the table; returns the process's exit code."""
    args = _arguments()
    path = str(model_path())
    tokenizer = load_tokenizer(path)
    messages = [[{"role": "user", "content": QUESTION + row["prompt"]}] for row in prompts()[: max(args.rows)]]
    token_ids = [encode_chat(tokenizer, conversation)[1] for conversation in messages]
    dtype = getattr(torch, args.dtype)
    directory, file = os.path.split(path)
    reference = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=dtype).eval()
    engine = Engine(EngineConfig(model=path, dtype=args.dtype, device="cpu"))
    results = []
    for rows in args.rows:
        ours = _Run(lambda batch: _ours(engine, batch, args.max_tokens), token_ids[:rows])
        theirs = _Run(lambda batch: _theirs(reference, batch, args.max_tokens), token_ids[:rows])
        for _ in range(args.repeat):
            ours.once()
            theirs.once()
        equal = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
        if args.dtype == "float32" and equal != rows:
            print(f"correctness gate: only {equal} of {rows} rows are equal", file=sys.stderr)
            return 1
        results.append(_line(args, rows, ours, theirs, equal))
        print(json.dumps(results[-1]), flush=True)
    return 0


class _Run:
    """One contender on one batch: its best wall time and its tokens."""

    def __init__(self, generate: Callable[[list[list[int]]], list[list[int]]], batch: list[list[int]]) -> None:
        self._generate, self._batch = generate, batch
        self.walls: list[float] = []
        self.tokens: list[list[int]] = []

    def once(self) -> None:
        start = time.perf_counter()
        self.tokens = self._generate(self._batch)
        self.walls.append(time.perf_counter() - start)


def _ours(engine: Engine, batch: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for index, token_ids in enumerate(batch):
        prompt = np.array(token_ids, dtype=np.int32)
        engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params))
    outputs: dict[int, list[int]] = {}
    while engine.has_unfinished():
        outputs |= {int(output.request_id): output.outputs[0].token_ids for output in engine.step()}
    return [outputs[index] for index in range(len(batch))]


@torch.inference_mode()
def _theirs(model: torch.nn.Module, batch: list[list[int]], max_tokens: int) -> list[list[int]]:
    longest = max(map(len, batch))
    padded = torch.tensor([[0] * (longest - len(token_ids)) + token_ids for token_ids in batch])
    mask = torch.tensor([[0] * (longest - len(token_ids)) + [1] * len(token_ids) for token_ids in batch])
    output = model.generate(  # type: ignore[operator]
        input_ids=padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[list[int]] = output[:, longest:].tolist()
    return tokens


def _line(args: argparse.Namespace, rows: int, ours: _Run, theirs: _Run, equal: int) -> dict[str, object]:
    count = rows * args.max_tokens
    return {
        "rows": rows,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "engine_tok_s": round(count / min(ours.walls), 1),
        "transformers_tok_s": round(count / min(theirs.walls), 1),
        "ratio": round(min(theirs.walls) / min(ours.walls), 2),
        "rows_equal": equal,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
