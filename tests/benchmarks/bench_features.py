"""What rows' parameters cost: `decode`'s rows with log-probabilities, drawn tokens, a JSON schema, adapters, and none.

    python -m tests.benchmarks.bench_features [--model llama-3.2-1b] [--case logprobs json …] [--runs 3] [--out FILE]

Dummy weights, 1024 rows of 64 tokens in and 512 out, EOS ignored, so that all cases do the same steps; every run's
output counts are asserted. The case `none` runs first and again last, in the same process, and shares are of the faster
of the two; `lora-none` is an engine made for adapters whose rows have none. The schemas are such that cannot be
satisfied within the output, over a real vocabulary cut to the model's size, and the outputs' beginnings are checked:
`json` has a string of any length, as most do, and `json-bounded` one of at most 40 characters, over which llguidance
takes many times as long.
`prompt-logprobs` runs when it is asked for: four prompts of 32,768 tokens, one token out, beside the same without.
"""

from __future__ import annotations

import argparse
import base64
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import LoRARequest, Request
from raydata_llm.engine.sampling_params import SamplingParams
from tests.benchmarks.workloads import SHAPES, Work, decode, write_shape

NUM_ADAPTERS, LORA_RANK = 16, 16


def _records(name: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list of records, whose names are as given."""
    properties = {
        "name": name,
        "kind": {"enum": ["person", "place", "thing"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
    }
    item = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "array", "minItems": 400, "items": item}


_PLAIN_SCHEMA = _records({"type": "string"})
_SCHEMA = _records({"type": "string", "minLength": 1, "maxLength": 40})
# Case: what each row asks for besides a greedy draw.
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
    "logprobs": {"logprobs": 5},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.1},
    "json": {"structured_outputs": {"json": _PLAIN_SCHEMA}},
    "json-bounded": {"structured_outputs": {"json": _SCHEMA}},
    "lora-none": {},
    "lora": {},
    "prompt-none": {},
    "prompt-logprobs": {"prompt_logprobs": 1},
}


class Rows:
    """One engine and the timed runs of `decode`'s rows on it."""

    def __init__(self, model: str, path: Path, engine_kwargs: dict[str, Any], tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.works = {
            "decode": decode(SHAPES[model]["vocab_size"]),
            "prompt": long_prompts(SHAPES[model]["vocab_size"]),
        }
        config = EngineConfig(model=str(path), load_format="dummy", **engine_kwargs)
        self.engine = Engine(config, tokenizer=tokenizer)

    def time(self, case: str, runs: int, adapters: list[LoRARequest]) -> float:
        """The best wall of some runs, after one of 16 tokens."""
        self.generate(case, adapters, most=16)
        gc.collect()
        return min(self.generate(case, adapters) for _ in range(runs))

    def generate(self, case: str, adapters: list[LoRARequest], most: int = 1 << 30) -> float:
        """Wall seconds of all rows, their outputs checked."""
        self.engine.reset_prefix_cache()
        work = self.works["prompt" if "prompt" in case else "decode"]
        outputs: dict[int, list[int]] = {}
        began = time.perf_counter()
        for index, (prompt, max_tokens) in enumerate(work):
            self.engine.add_request(
                Request(
                    request_id=str(index),
                    prompt_token_ids=np.fromiter(prompt, dtype=np.int32, count=len(prompt)),
                    sampling_params=SamplingParams(
                        **{"temperature": 0.0, "max_tokens": min(most, max_tokens), "ignore_eos": True} | CASES[case]
                    ),
                    key=index,
                    lora_request=adapters[index % len(adapters)] if adapters else None,
                )
            )
        while self.engine.has_unfinished():
            for output in self.engine.step():
                assert output.error is None, output.error
                row, written = int(output.request_id), output.outputs[0]
                outputs[row] = written.token_ids
                assert case != "logprobs" or len(written.logprobs or ()) == len(written.token_ids)
                assert case != "prompt-logprobs" or len(output.prompt_logprobs or ()) == len(work[row][0])
        wall = time.perf_counter() - began
        assert [len(outputs[row]) for row in range(len(work))] == [min(most, asked) for _, asked in work]
        if case.startswith("json"):
            for token_ids in outputs.values():
                assert str(self.tokenizer.decode(token_ids)).lstrip().startswith("["), "the schema was not followed"
        return wall


def measure(model: str, cases: list[str], runs: int) -> list[dict[str, Any]]:
    """A line for each case."""
    walls: dict[str, float] = {}
    adapted = [case for case in cases if "lora" in case]
    plain = [case for case in cases if case not in adapted and "prompt" not in case]
    order = ["none", *plain, "none"] if plain or adapted else []
    order += ["prompt-none", "prompt-logprobs"] if "prompt-logprobs" in cases else []
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(model, Path(folder))
        sizes = SHAPES[model]["vocab_size"], SHAPES[model]["eos_token_id"]
        rows = Rows(model, path, {}, real_tokenizer(*sizes) if {"json", "json-bounded"} & {*cases} else None)
        for case in order:
            wall = rows.time(case, runs, [])
            walls[case] = min(wall, walls.get(case, wall))
            print(f"{model} {case}: {wall:.3f} s", flush=True)
        rows.engine.shutdown()
        del rows
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if adapted:
            adapters = list(save_adapters(SHAPES[model], Path(folder)))
            rows = Rows(model, path, {"enable_lora": True, "max_loras": NUM_ADAPTERS, "max_lora_rank": LORA_RANK})
            for case in adapted:
                walls[case] = rows.time(case, runs, adapters if case == "lora" else [])
                print(f"{model} {case}: {walls[case]:.3f} s", flush=True)
            rows.engine.shutdown()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        {
            "model": model,
            "case": case,
            "gpu": gpu,
            "wall_s": round(wall, 3),
            "over_none": round(wall / walls["prompt-none" if "prompt" in case else "none"], 3),
        }
        for case, wall in walls.items()
    ]


def long_prompts(vocab_size: int) -> Work:
    """Four prompts of 32,768 tokens, one token out."""
    rng = np.random.default_rng(9)
    return [(rng.integers(100, vocab_size - 100, size=32768).tolist(), 1) for _ in range(4)]


def save_adapters(shape: dict[str, Any], folder: Path) -> Iterator[LoRARequest]:
    """Random adapters of all linears, as PEFT saves them."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head_dim = shape.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, shape["num_key_value_heads"] * head_dim
    sizes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    for number in range(NUM_ADAPTERS):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(shape["num_hidden_layers"]):
            for name, (inputs, outputs) in sizes.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}.lora"
                tensors[f"{prefix}_A.weight"] = torch.randn(LORA_RANK, inputs, generator=generator).bfloat16() * 0.02
                tensors[f"{prefix}_B.weight"] = torch.randn(outputs, LORA_RANK, generator=generator).bfloat16() * 0.02
        path = folder / f"adapter-{number}"
        path.mkdir()
        settings = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, path / "adapter_model.safetensors")
        yield LoRARequest(path.name, number + 1, str(path))


def real_tokenizer(vocab_size: int, eos_token_id: int) -> Any:
    """A tokenizer of that size: the most frequent words of Mistral's vocabulary of 131,072, in its order.

    What a mask costs depends on the vocabulary's words, and what a grammar forces on how they merge: random words take
    llguidance twenty times as long. From the PyPI package mistral-common (Apache-2.0), whose code is not run.

    Raises:
        FileNotFoundError: where the package is missing.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the cases of JSON need a real vocabulary: pip install --no-deps mistral-common")
    content = json.loads((Path(spec.submodule_search_locations[0]) / "data" / "tekken_240911.json").read_text())
    words = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][: vocab_size - 1]]
    ranks = {word: rank for rank, word in enumerate(words)}
    merges = []
    for rank, word in enumerate(words):
        parts = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        parts = [part for part in parts if ranks.get(part[0], rank) < rank and ranks.get(part[1], rank) < rank]
        merges += sorted(parts, key=lambda part: (ranks[part[0]], ranks[part[1]]))
    letters = bytes_to_unicode()

    def spelled(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    vocab = {spelled(word): rank + (rank >= eos_token_id) for word, rank in ranks.items()} | {"<|end|>": eos_token_id}
    spelled_merges = [(spelled(left), spelled(right)) for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=spelled_merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(content["config"]["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def main() -> int:
    """Time the asked cases; prints a line each and writes a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument(
        "--case", choices=CASES, nargs="+", default=[case for case in CASES if case != "none" and "prompt" not in case]
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs of a case")
    parser.add_argument("--out", help="file for the JSON list")
    args = parser.parse_args()
    results = measure(args.model, args.case, args.runs)
    for line in results:
        print(f"{line['case']:>15} {line['wall_s']:8.3f} s {line['over_none']:6.3f} of none")
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
