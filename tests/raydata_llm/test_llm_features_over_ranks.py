"""What a row may ask for, asked of an `LLM` over several ranks: the same text as from one, or a clear refusal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import LLM, SamplingParams, StructuredOutputsParams
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 128,
    "max_num_seqs": 16,
    "reasoning_config": {"reasoning_start_str": "the", "reasoning_end_str": "fox"},
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
LAYOUTS = [
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    pytest.param({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, marks=pytest.mark.slow),
]


def structured(**asked: Any) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(**asked)}


# Each a row of one batch.
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0} | structured(json=SCHEMA, disable_any_whitespace=True),
    {"temperature": 1.0, "seed": 1} | structured(json=SCHEMA, disable_any_whitespace=True),
    {"temperature": 0.9, "seed": 2, "n": 3} | structured(choice=["hello", "world", "lazy"]),
    {"temperature": 1.0, "seed": 3, "logprobs": 2} | structured(regex=r"[a-f]{3}-\d\d"),
    {"temperature": 1.0, "seed": 4, "presence_penalty": 1.0} | structured(regex=r"(ab|cd){2,4}"),
    {"temperature": 1.0, "seed": 5, "thinking_token_budget": 4},
    {"temperature": 0.0, "bad_words": ["the", "o"], "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 6, "stop": ["e", "q"], "include_stop_str_in_output": True},
    {"temperature": 1.0, "seed": 7, "n": 2, "top_k": 9, "frequency_penalty": 0.3},
    {"temperature": 1.0, "seed": 8, "top_p": 0.6, "min_p": 0.02, "n": 2},
    {"temperature": 0.0, "prompt_logprobs": 1, "logprobs": 1},
    {"temperature": 0.5, "seed": 9, "logit_bias": {20: 5.0}, "min_tokens": 3, "stop_token_ids": [20]},
]
PROMPTS = [f"hello {index} the quick" for index in range(len(ASKED))]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("qwen3", num_attention_heads=4, num_key_value_heads=1), folder)
    return str(save_tokenizer(folder))


def written(model: str, **sizes: Any) -> list[Any]:
    params = [SamplingParams(**{"max_tokens": 24} | asked) for asked in ASKED]
    with LLM(model, **SETTINGS, **sizes) as llm:
        results = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [result.error for result in results] == [None] * len(ASKED)
    assert [len(result.outputs) for result in results] == [asked.get("n", 1) for asked in ASKED]
    return [
        [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in result.outputs] for result in results
    ]


@pytest.fixture(scope="module")
def expected(model: str) -> list[Any]:
    return written(model)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_all_that_a_row_may_ask_for_is_the_same_over_ranks(
    model: str, expected: list[Any], sizes: dict[str, int]
) -> None:
    assert written(model, **sizes) == expected


class Processor:
    """A user's logits processor."""

    def __init__(self, **_: Any) -> None:
        """Never made."""


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"logits_processors": [Processor]}, "logits_processors .*tensor_parallel_size=2.*leave"),
        ({"runner": "pooling"}, "tensor_parallel_size=2 "),
        ({"device": "cuda:1"}, "device='cuda:1' names one GPU.*tensor_parallel_size=2 .* is 2: give 'cuda'"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide num_attention_heads=4.* 1, 2, 4$"),
    ],
    ids=["logits processors", "pooling", "one GPU's name", "heads"],
)
def test_what_ranks_do_not_do_is_refused_by_name(model: str, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LLM(model, **{**SETTINGS, "tensor_parallel_size": 2, **settings})
