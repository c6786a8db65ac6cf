"""Prompts of embeddings as users give them: to `LLM`, and in a processor's rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raydata_llm import LLM, EmbedsPrompt, EngineProcessorConfig, LoRARequest, SamplingParams, build_llm_processor
from raydata_llm.row_payload import RowError
from raydata_llm.row_ticket import append_tickets, read_tickets
from tests.engine.lora_adapters import adapter_pairs, save_adapter
from tests.raydata_llm.processor_chain import prepared
from tests.raydata_llm.processor_fakes import ray_session
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("qwen3"), copy)
    return save_tokenizer(copy)


@pytest.fixture(scope="module")
def table(folder: Path) -> torch.Tensor:
    """The model's embedding table."""
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), enable_prompt_embeds=True, **SETTINGS) as made:
        yield made


def tokens_of(results: list[Any]) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in results]


def test_embeddings_text_and_ids_mix_in_one_call(llm: LLM, table: torch.Tensor) -> None:
    ids = llm.get_tokenizer()("hello world")["input_ids"]
    embeds = table[ids]
    typed: EmbedsPrompt = {"prompt_embeds": embeds, "prompt": "hello world"}
    prompts: list[Any] = ["hello world", typed, {"prompt_embeds": embeds.numpy()}, ids, {"prompt_embeds": embeds[None]}]
    results = llm.generate(prompts, GREEDY)
    assert tokens_of(results) == [tokens_of(results)[0]] * len(prompts)
    assert [result.prompt for result in results] == ["hello world", "hello world", None, None, None]
    assert results[1].prompt_token_ids == [0] * len(ids) and results[1].outputs[0].text == results[0].outputs[0].text
    [alone] = llm.generate({"prompt_embeds": embeds}, GREEDY)
    assert alone.outputs[0].token_ids == results[0].outputs[0].token_ids
    [queued] = llm.enqueue(typed, GREEDY)
    assert [(one.request_id, tokens_of([one])) for one in llm.as_completed()] == [(queued, tokens_of([results[0]]))]


def test_a_wrong_matrix_is_one_error_and_the_others_finish(llm: LLM, table: torch.Tensor) -> None:
    good = table[[5, 6, 7]]
    prompts = [
        {"prompt_embeds": good},
        {"prompt_embeds": good[:, :-1]},
        {"prompt_embeds": torch.tensor([[1, 2]])},
        {"prompt_embeds": good[0]},
        {"prompt_embeds": good, "prompt_token_ids": [5, 6, 7]},
        {"prompt_embeds": table[:96]},
        {"prompt_embeds": good},
    ]
    first, narrow, ids, vector, both, long, last = llm.generate(prompts, GREEDY)
    assert first.error is None and tokens_of([first]) == tokens_of([last])
    assert str(narrow.error).startswith("ValueError: prompt_embeds has 87 numbers a token")
    assert "int64 of shape [1, 2]: give floating-point" in str(ids.error)
    assert "float32 of shape [88]" in str(vector.error)
    assert "both given" in str(both.error)
    assert "max_model_len=96 leaves no room" in str(long.error)


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_bare_matrix_is_one_prompt_that_says_how_to_give_it(kind: str, llm: LLM, table: torch.Tensor) -> None:
    matrix: Any = table[[5, 6, 7]] if kind == "tensor" else table[[5, 6, 7]].numpy()
    for results in (llm.generate(matrix, GREEDY), llm.generate([matrix], GREEDY)):
        [result] = results
        assert result.error is not None and result.error.endswith(': give {"prompt_embeds": ...}')
        assert len(result.error) < 400
    # A matrix of token ids is a prompt a row.
    assert [one.prompt_token_ids for one in llm.generate(np.array([[5, 6], [7, 8]]), GREEDY)] == [[5, 6], [7, 8]]


def test_other_embeddings_draw_other_noise_and_the_same_ones_draw_anew(folder: Path, table: torch.Tensor) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    def drawn(*prompts: torch.Tensor) -> list[list[int]]:
        with LLM(str(folder), enable_prompt_embeds=True, **SETTINGS) as llm:
            return tokens_of(llm.generate([{"prompt_embeds": one} for one in prompts], params))

    one, other = table[[5, 6, 7]], table[[5, 6, 7]] * (1 + 1e-6)
    first, second, third = drawn(one, other, one)
    assert first != second and first != third
    assert drawn(other, one) == [second, first], "whatever order they come in"


def test_what_takes_tokens_only_says_so(llm: LLM, folder: Path, table: torch.Tensor) -> None:
    prompt = {"prompt_embeds": table[[5, 6]]}
    [refused] = llm.beam_search([prompt], {"beam_width": 2, "max_tokens": 2})
    assert "prompt_embeds is taken by generate and enqueue only" in str(refused.error)
    with LLM(str(folder), **SETTINGS) as plain:
        assert "enable_prompt_embeds=True" in str(plain.generate(prompt)[0].error)
    with pytest.raises(ValueError, match="enable_prompt_embeds=True is not supported for pooling models"):
        LLM(str(folder), enable_prompt_embeds=True, runner="pooling", **SETTINGS)
    with LLM(str(folder), runner="pooling", **SETTINGS) as embedder:
        assert "generate and enqueue only" in str(embedder.embed(prompt)[0].error)


def test_an_adapter_and_its_base_share_no_cached_embeddings(folder: Path, table: torch.Tensor, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", *adapter_pairs(AutoModelForCausalLM.from_pretrained(folder), 3))
    adapter = LoRARequest("a", 1, str(tmp_path / "a"))
    ids = list(range(5, 45))
    prompts: list[Any] = [{"prompt_embeds": table[ids]}, ids]
    with LLM(str(folder), enable_prompt_embeds=True, enable_lora=True, **SETTINGS) as llm:
        base = tokens_of(llm.generate(prompts, GREEDY))
        adapted = tokens_of(llm.generate(prompts, GREEDY, lora_request=adapter))
    assert base[0] == base[1] != adapted[0] == adapted[1]


def test_rows_bring_embeddings(folder: Path, table: torch.Tensor) -> None:
    matrix = table[[5, 6, 7]].numpy()
    rows = pa.table({"id": [0, 1, 2, 3]})
    forms = [matrix, matrix.tolist(), table[[5, 6, 7]], matrix.astype(np.float64)]

    def give(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": forms[row["id"]], "prompt": "of these", "note": row["id"]}

    requests, carried = prepared(rows, str(folder), preprocess=give, prompt_embeds=True)
    for request in requests:
        assert request.prompt_embeds is not None and np.array_equal(request.prompt_embeds, matrix)
        assert request.prompt_token_ids is not None and request.prompt_token_ids.tolist() == [0, 0, 0]
    # Not carried past the engine a second time.
    assert [one.columns for one in carried] == [{"prompt": "of these", "note": number} for number in range(4)]
    assert [one.prompt for one in carried] == ["of these"] * 4
    same = [{"id": 0, "prompt_embeds": form} for form in forms]
    digests = [prepared(rows[:1], str(folder), preprocess=lambda _, made=one: made, prompt_embeds=True) for one in same]
    assert len({made[0][0].digest for made in digests}) == 1, "the same numbers are the same row"
    other = prepared(
        rows[:1], str(folder), preprocess=lambda _: {"id": 0, "prompt_embeds": matrix * 2}, prompt_embeds=True
    )
    assert other[0][0].digest != digests[0][0][0].digest


def test_a_datasets_own_column_may_hold_them(folder: Path, table: torch.Tensor) -> None:
    matrix = table[[5, 6, 7]].numpy()
    nested = pa.array([matrix.tolist()], pa.list_(pa.list_(pa.float32())))
    [request], _ = prepared(pa.table({"prompt_embeds": nested}), str(folder), prompt_embeds=True)
    assert request.prompt_embeds is not None and np.array_equal(request.prompt_embeds, matrix)


def test_embeddings_need_their_setting_and_leave_other_prompts_alone(folder: Path) -> None:
    table = pa.table({"id": [0]})
    with pytest.raises(RowError, match="enable_prompt_embeds"):
        prepared(table, str(folder), preprocess=lambda _: {"prompt_embeds": [[0.5]]})
    [request], [carried] = prepared(table, str(folder), preprocess=lambda _: {"prompt_embeds": 3, "prompt": "hello"})
    assert request.prompt_embeds is None and carried.columns["prompt_embeds"] == 3
    [failed], _ = prepared(
        table, str(folder), preprocess=lambda _: {"prompt_embeds": [[1, 2]]}, prompt_embeds=True, keep_going=True
    )
    assert failed.error is not None and failed.error.startswith("ValueError: prompt_embeds is int64 of shape [1, 2]")


def test_rows_of_embeddings_are_not_taken_for_a_shared_prefix(folder: Path) -> None:
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(200, 4)).astype(np.float32) for _ in range(2)]
    table = pa.table({"id": [0, 1]})
    requests, _ = prepared(
        table, str(folder), preprocess=lambda row: {"prompt_embeds": matrices[row["id"]]}, prompt_embeds=True
    )
    tickets = read_tickets(append_tickets(table, "ticket", requests).column("ticket"))
    assert tickets["prefix"].tolist() == [0, 0]


def test_a_processor_answers_them(folder: Path, table: torch.Tensor, llm: LLM) -> None:
    weights = table.numpy()
    config = EngineProcessorConfig(
        model_source=str(folder),
        engine_kwargs={**SETTINGS, "enable_prompt_embeds": True},
        should_continue_on_error=True,
        batch_size=4,
    )

    def give(row: dict[str, Any]) -> dict[str, Any]:
        ids = np.arange(5, 9 + row["id"])
        # A row in three is of token ids, and one has a matrix of another model.
        prompt = {"tokenized_prompt": ids.tolist()} if row["id"] % 3 == 0 else {"prompt_embeds": weights[ids]}
        prompt = {"prompt_embeds": weights[ids][:, :5]} if row["id"] == 7 else prompt
        return {**prompt, "sampling_params": {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}}

    with ray_session():
        rows = build_llm_processor(config, preprocess=give)(ray.data.range(12)).take_all()
    assert len(rows) == 12
    for row in rows:
        if row["id"] == 7:
            assert "prompt_embeds has 5 numbers a token" in row["__inference_error__"]
            continue
        assert row["__inference_error__"] == "" and "prompt_embeds" not in row
        [expected] = llm.generate([list(range(5, 9 + row["id"]))], GREEDY)
        assert list(row["generated_tokens"]) == expected.outputs[0].token_ids
        assert row["num_input_tokens"] == 4 + row["id"]
