"""Prompts of embeddings write what transformers' `generate(inputs_embeds=...)` does, and tokens' own what ids do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.prompt_embeds import Embeds, as_embeds, block_keys, embedded_tokens
from raydata_llm.engine.request import Request, RequestOutput, request_digest
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.optimism import optimistic_admission
from tests.engine.tiny_shape import write_tiny_shape

LENGTHS = (1, 5, 16, 33, 64, 100, 3, 47)
MAX_TOKENS = 24
TIGHT: dict[str, Any] = {"max_model_len": 125, "block_size": 5, "num_gpu_blocks_override": 30, "max_num_seqs": 7}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "launched ahead": {"steps_ahead": 2},
    "tiny blocks": {"block_size": 2},
    "preempted": {**TIGHT, "optimistic": True},
    "preempted, launched ahead, chunked": {
        **TIGHT,
        "optimistic": True,
        "steps_ahead": 2,
        "max_num_batched_tokens": 9,
    },
    "preempted, no prefix cache": {**TIGHT, "optimistic": True, "enable_prefix_caching": False},
}


@dataclass
class Reference:
    """A model, prompts of embeddings that are no token's and of ids, and what transformers writes after each."""

    path: Path
    table: Embeds
    embeds: list[Embeds]
    ids: list[np.ndarray[Any, np.dtype[np.int32]]]
    after_embeds: list[list[int]]
    after_ids: list[list[int]]


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[..., Path]) -> Callable[[str], Reference]:
    cache: dict[str, Reference] = {}

    def build(family: str) -> Reference:
        if family not in cache:
            path = tiny_model(family)
            model = AutoModelForCausalLM.from_pretrained(path).eval()
            table = model.get_input_embeddings().weight.detach().numpy().copy()
            rng = np.random.default_rng(5)
            shared = rng.normal(0, table.std(), (20, table.shape[1])).astype(np.float32)
            drawn = [rng.normal(0, table.std(), (length, table.shape[1])).astype(np.float32) for length in LENGTHS]
            embeds = [*drawn, np.concatenate([shared, drawn[1]]), np.concatenate([shared, drawn[2]])]
            ids = [rng.integers(3, len(table), length).astype(np.int32) for length in LENGTHS]
            cache[family] = Reference(
                path=path,
                table=table,
                embeds=embeds,
                ids=ids,
                after_embeds=[transformers_greedy(model, one) for one in embeds],
                after_ids=[transformers_greedy(model, table[one]) for one in ids],
            )
        return cache[family]

    return build


def transformers_greedy(model: Any, embeds: Embeds) -> list[int]:
    inputs = torch.from_numpy(embeds)[None]
    with torch.inference_mode():
        output = model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
    tokens: list[int] = output[0].tolist()
    return tokens


def asked(name: str, prompt: np.ndarray[Any, Any], key: int = 0, **params: Any) -> Request:
    given = {"temperature": 0.0, "max_tokens": MAX_TOKENS, **params}
    field: dict[str, Any] = {"prompt_embeds": prompt} if prompt.ndim == 2 else {"prompt_token_ids": prompt}
    return Request(request_id=name, sampling_params=SamplingParams(**given), key=key, **field)


def run(engine: Engine, requests: list[Request]) -> list[RequestOutput]:
    for request in requests:
        engine.add_request(request)
    found: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        found |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    return [found[request.request_id] for request in requests]


def made(path: Path, **settings: Any) -> Engine:
    return Engine(EngineConfig(model=str(path), device="cpu", enable_prompt_embeds=True, **settings))


def written(results: list[RequestOutput]) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in results]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_embeddings_and_ids_in_one_batch_write_what_transformers_writes(
    family: str, way: str, reference: Callable[[str], Reference]
) -> None:
    known, settings = reference(family), dict(WAYS[way])
    prompts: list[Any] = [*known.embeds, *known.ids]
    expected = [*known.after_embeds, *known.after_ids]
    order = np.random.default_rng(len(way)).permutation(len(prompts)).tolist()
    with optimistic_admission(settings.pop("optimistic", False)):
        engine = made(known.path, **settings)
        results = run(engine, [asked(str(index), prompts[index]) for index in order])
    assert written(results) == [expected[index] for index in order]
    assert (engine.stats().num_preemptions > 0) == way.startswith("preempted")
    assert [len(result.prompt_token_ids) for result in results] == [len(prompts[index]) for index in order]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "n": 3, "logprobs": 2}, {"min_tokens": 9, "logit_bias": {2: 9.0}}]
)
def test_embeddings_of_tokens_write_what_the_tokens_write(
    params: dict[str, Any], reference: Callable[[str], Reference]
) -> None:
    known = reference("llama")
    engine = made(known.path, max_num_batched_tokens=32, max_num_seqs=8)
    of_ids = run(engine, [asked(f"i{number}", ids, number, **params) for number, ids in enumerate(known.ids)])
    of_embeds = run(
        engine, [asked(f"e{number}", known.table[ids], number, **params) for number, ids in enumerate(known.ids)]
    )
    for one, other in zip(of_ids, of_embeds, strict=True):
        assert [output.token_ids for output in one.outputs] == [output.token_ids for output in other.outputs]
        assert other.prompt_token_ids == [0] * len(one.prompt_token_ids)
        for output, another in zip(one.outputs, other.outputs, strict=True):
            for position, its in zip(output.logprobs or [], another.logprobs or [], strict=True):
                assert {token: entry.logprob for token, entry in position.items()} == pytest.approx(
                    {token: entry.logprob for token, entry in its.items()}, abs=1e-4
                )


@pytest.mark.gpu
def test_on_a_gpu_embeddings_of_tokens_write_what_the_tokens_write(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(write_tiny_shape(tmp_path)),
        load_format="dummy",
        enable_prompt_embeds=True,
        max_num_batched_tokens=64,
        max_num_seqs=32,
    )
    engine: Any = Engine(config)
    table = engine._worker._decoder._embedding.float().cpu().numpy()
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, len(table), length).astype(np.int32) for length in (1, 17, 64, 100, 300)]
    of_ids = run(engine, [asked(f"i{index}", ids, index) for index, ids in enumerate(prompts)])
    of_embeds = run(engine, [asked(f"e{index}", table[ids], index) for index, ids in enumerate(prompts)])
    mixed = run(engine, [asked(f"m{index}", table[ids] if index % 2 else ids) for index, ids in enumerate(prompts)])
    assert written(of_embeds) == written(of_ids) == written(mixed)
    assert len({token for tokens in written(of_ids) for token in tokens}) > 5


def test_equal_beginnings_are_computed_once_and_never_taken_for_others(reference: Callable[[str], Reference]) -> None:
    known = reference("llama")
    engine = made(known.path)
    first = run(engine, [asked("first", known.embeds[8])])
    again = run(engine, [asked("again", known.embeds[8]), asked("sharing", known.embeds[9])])
    # Positions have token id 0, and so has this prompt: nothing of theirs is its own.
    zeros = run(engine, [asked("zeros", np.zeros(25, dtype=np.int32))])
    assert [result.num_cached_tokens for result in [*first, *again, *zeros]] == [0, 16, 16, 0]
    assert written([*first, *again]) == [known.after_embeds[index] for index in (8, 8, 9)]
    close = known.embeds[8].copy()
    close[3, 0] = np.nextafter(close[3, 0], np.float32(9.0))
    assert run(engine, [asked("close", close)])[0].num_cached_tokens == 0


def test_penalties_count_no_prompt_token(reference: Callable[[str], Reference]) -> None:
    known = reference("llama")
    engine = made(known.path)
    # The bias makes 0, the id that its positions have, the likeliest token, by less than the penalty takes.
    params: dict[str, Any] = {"repetition_penalty": 1e9, "logit_bias": {0: 100.0}, "max_tokens": 3, "ignore_eos": True}
    [of_embeds] = run(engine, [asked("embeds", known.embeds[2], **params)])
    [of_ids] = run(engine, [asked("ids", np.array([*known.ids[2], 0, 7], dtype=np.int32), **params)])
    assert 0 in of_embeds.outputs[0].token_ids and 0 not in of_ids.outputs[0].token_ids


def test_a_truncated_prompt_keeps_its_last_embeddings(reference: Callable[[str], Reference]) -> None:
    known = reference("llama")
    engine = made(known.path)
    padded = np.concatenate([known.embeds[5], known.embeds[2]])
    [result] = run(engine, [asked("cut", padded, truncate_prompt_tokens=16)])
    assert result.outputs[0].token_ids == known.after_embeds[2]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_ranks_write_the_same(layout: tuple[int, int], tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama", num_attention_heads=8, num_hidden_layers=4)
    rng = np.random.default_rng(1)
    embeds = [rng.normal(0, 0.2, (length, 96)).astype(np.float32) for length in (4, 40, 19)]
    prompts: list[Any] = [*embeds, rng.integers(3, 1031, 12).astype(np.int32)]
    params = [{}, {"repetition_penalty": 1.3}, {"temperature": 1.0, "n": 2}, {}]
    requests = [asked(str(index), one, index, **params[index]) for index, one in enumerate(prompts)]
    expected = run(made(path), requests)
    tp_size, pp_size = layout
    engine = made(
        path, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, max_num_batched_tokens=16, max_num_seqs=4
    )
    try:
        results = run(engine, requests)
    finally:
        engine.shutdown()
    for result, other in zip(results, expected, strict=True):
        assert [one.token_ids for one in result.outputs] == [one.token_ids for one in other.outputs]


def test_what_cannot_be_run_is_refused_by_name(reference: Callable[[str], Reference]) -> None:
    known = reference("llama")
    engine = made(known.path, max_model_len=64)
    refused = [
        (asked("narrow", known.embeds[1][:, :-1]), "prompt_embeds has 95 numbers a token .* hidden_size is 96"),
        (asked("logprobs", known.embeds[1], prompt_logprobs=0), "prompt_logprobs cannot be told of prompt_embeds"),
        (asked("long", known.embeds[4]), "64 tokens and max_model_len=64 leaves no room"),
    ]
    for request, message in refused:
        with pytest.raises(ValueError, match=message):
            engine.add_request(request)
    assert not engine.has_unfinished()
    plain = Engine(EngineConfig(model=str(known.path), device="cpu"))
    with pytest.raises(ValueError, match="prompt_embeds needs enable_prompt_embeds=True"):
        plain.add_request(asked("off", known.embeds[1]))
    with pytest.raises(ValueError, match="both given"):
        Request(
            request_id="both",
            prompt_token_ids=known.ids[1],
            prompt_embeds=known.embeds[1],
            sampling_params=SamplingParams(),
        )


FORMS: dict[str, Any] = {
    "tensor": torch.tensor([[0.5, -2.0]]),
    "bfloat16 that needs a gradient": torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16, requires_grad=True),
    "a batch of one": torch.tensor([[[0.5, -2.0]]]),
    "float64": np.array([[0.5, -2.0]]),
    "float16": np.array([[0.5, -2.0]], dtype=np.float16),
    "lists": [[0.5, -2]],
    "arrays in an array of objects": np.array([None, np.array([0.5, -2.0])], dtype=object)[1:],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_float32(form: str) -> None:
    embeds = as_embeds(FORMS[form])
    assert embeds.dtype == np.float32 and embeds.tolist() == [[0.5, -2.0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], r"float64 of shape \[2\]: give floating-point numbers of shape \[tokens, hidden_size\]"),
        ([[1, 2]], r"int64 of shape \[1, 2\]"),
        (torch.tensor([[1, 2]]), r"int64 of shape \[1, 2\]"),
        (np.zeros((2, 3, 4)), r"shape \[2, 3, 4\]"),
        (np.zeros((0, 4)), r"shape \[0, 4\]"),
        ([[1.0], [1.0, 2.0]], "rows of different lengths"),
        ([[1.0, float("nan")]], "not finite"),
        ("text", "<U4 of shape"),
        (None, "object of shape"),
    ],
)
def test_what_is_no_matrix_of_finite_numbers_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt_embeds .*{message}"):
        as_embeds(value)


def test_a_steps_embeddings_stand_where_their_chunks_do() -> None:
    one, other = np.arange(8, dtype=np.float32).reshape(4, 2), np.full((3, 2), 9, dtype=np.float32)
    # The first chunk goes past its prompt's end: a preempted sequence's outputs follow.
    found = embedded_tokens([(one, 1, 5), (None, 0, 2), (other, 3, 4), (other, 0, 2)])
    assert found is not None
    assert found.places.tolist() == [0, 1, 2, 11, 12]
    assert found.values.tolist() == [[2, 3], [4, 5], [6, 7], [9, 9], [9, 9]]
    assert embedded_tokens([(None, 0, 3), (one, 4, 1)]) is None


def test_blocks_are_known_by_all_that_is_in_them() -> None:
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(11, 3)).astype(np.float32)
    outputs = np.arange(8, dtype=np.int32)
    keys = block_keys(embeds, outputs, 6)
    assert len(keys) == 3 * 24 and block_keys(embeds, outputs[:1], 6) == keys[:48]
    assert keys[48:] == outputs[1:7].tobytes()
    assert all(np.frombuffer(keys[start : start + 4], np.int32)[0] < 0 for start in (0, 24))
    changed = embeds.copy()
    changed[10, 2] += 1
    assert block_keys(changed, outputs, 6)[:24] == keys[:24] != block_keys(changed, outputs, 6)[24:48]
    assert block_keys(embeds, outputs + 1, 6)[24:48] != keys[24:48]
    assert block_keys(embeds, outputs, 4) == b""


def test_the_noise_depends_on_the_embeddings() -> None:
    embeds, zeros = np.ones((2, 3), dtype=np.float32), np.zeros(2, dtype=np.int32)
    digests = [request_digest(zeros, SamplingParams(), "", one) for one in (None, embeds, embeds * 2)]
    assert len(set(digests)) == 3
