"""`LLM` over several ranks and several engines, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydata_llm import LLM

PROMPTS = [[3 + index, 5, 9, 300] for index in range(40)]
PARAMS = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
SETTINGS: dict[str, Any] = {"device": "cpu", "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}


def written(model: str, **sizes: Any) -> list[list[int]]:
    with LLM(model, **SETTINGS, **sizes) as llm:
        first = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        again = llm.generate([*PROMPTS, []], PARAMS, use_tqdm=False)
        assert llm._open_engine().stats().num_output_tokens == 2 * 20 * len(PROMPTS)
    tokens = [output.outputs[0].token_ids for output in first]
    assert again[-1].error is not None and "empty" in again[-1].error
    assert [output.outputs[0].token_ids for output in again[:-1]] == tokens
    return tokens


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=str)
def test_an_llm_over_several_processes_writes_the_same(tiny_model: Callable[..., Path], sizes: dict[str, int]) -> None:
    model = str(tiny_model("llama", num_attention_heads=8))
    assert written(model, **sizes) == written(model)


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_a_beam_search_over_several_processes_finds_the_same(
    tiny_model: Callable[..., Path], sizes: dict[str, int]
) -> None:
    model = str(tiny_model("llama", num_attention_heads=8))

    def found(**sizes: Any) -> list[list[list[int]]]:
        with LLM(model, **SETTINGS, dtype="float32", **sizes) as llm:
            outputs = llm.beam_search(PROMPTS[:6], {"beam_width": 3, "max_tokens": 6})
        return [[sequence.tokens for sequence in output.sequences] for output in outputs]

    assert found(**sizes) == found()


def test_a_beam_search_of_several_engines_is_a_value_error(tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama", num_attention_heads=8))
    with (
        LLM(model, **SETTINGS, data_parallel_size=2) as llm,
        pytest.raises(ValueError, match="not supported with data_parallel_size above 1: build the LLM with 1"),
    ):
        llm.beam_search(PROMPTS[:2], {"beam_width": 3, "max_tokens": 6})


def test_engines_take_rows_as_they_have_room(tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama", num_attention_heads=8))
    with LLM(model, **SETTINGS, data_parallel_size=2) as llm:
        group: Any = llm._engine
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        shares = [member.engine.stats().num_output_tokens for member in group._members]
    # Each holds 12 at most, so neither can have taken all at once; what one leaves is the other's.
    assert sum(shares) == 20 * len(PROMPTS) and min(shares) > 0


def test_a_prompt_that_only_its_engine_refuses_is_one_error(tiny_model: Callable[..., Path]) -> None:
    each = [{**PARAMS, "bad_words": ["x"]} if index % 5 == 0 else PARAMS for index in range(len(PROMPTS))]
    with LLM(str(tiny_model("llama", num_attention_heads=8)), **SETTINGS, data_parallel_size=2) as llm:
        for _ in range(2):
            results = llm.generate(PROMPTS, each, use_tqdm=False)
            for index, result in enumerate(results):
                if index % 5 == 0:
                    assert result.error is not None and "bad_words needs the model's tokenizer" in result.error
                else:
                    assert result.error is None and len(result.outputs[0].token_ids) == 20


def test_data_parallel_sizes_that_cannot_be_are_value_errors(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model("llama", num_attention_heads=8))
    with pytest.raises(ValueError, match="data_parallel_size=0 is not valid"):
        LLM(model, **SETTINGS, data_parallel_size=0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="data_parallel_size=3 is 3 ranks, and this machine has 2 GPU"):
        LLM(model, **{**SETTINGS, "device": "cuda"}, data_parallel_size=3)
