"""Values of every kind in every field of every parameter class, and in rows: the engine goes on.

Each case has requests, or rows, of any values beside good ones. A request ends with a result, or an error of its own in
one short line; the engine's slots and blocks are whole after it, and its neighbours' tokens are the same as ever.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from raydata_llm import LLM, BeamSearchParams, LoRARequest, SamplingParams
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.engine_thread import EngineThread
from raydata_llm.engine.pooling_params import POOLING_TASKS, PoolingParams
from raydata_llm.engine.repetition import RepetitionDetectionParams
from raydata_llm.engine.request import sampling_key
from raydata_llm.engine.structured_outputs import StructuredOutputsParams
from raydata_llm.replica import Replica
from raydata_llm.row_payload import pack, unpack
from raydata_llm.tokenizer import load_tokenizer
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.processor_chain import prepared
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer, save_tokenizer

# Four requests or rows each. Some take a quarter of a minute; 10,000 requests take some ten minutes of a core.
CASES = [
    pytest.param(60, id="some"),
    pytest.param(2500, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
]
VOCAB = 1031
LONGEST_ERROR = 2000
POOLED = ["some text", "another, longer text"]

EDGES = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**5000]
integers = st.sampled_from([*EDGES, *(-edge for edge in EDGES)]) | st.integers(-3, 40)
floats = st.sampled_from(
    [0.0, -0.0, 0.3, 1.0, 5.0, 1e-320, 1e-40, 1e38, 1e39, 1e308, *map(float, ("inf", "-inf", "nan"))]
)
numpy_values = st.sampled_from(
    [
        np.int8(3),
        np.int64(-(2**63)),
        np.uint64(2**64 - 1),
        np.float16(0.5),
        np.float32(5),
        np.float64("nan"),
        np.bool_(True),
        np.array(5),
        np.array(0.5),
        np.array([5]),
        np.array([[5, 6], [7, 8]]),
        np.array([], dtype=np.int64),
        np.array(["a"], dtype=object),
    ]
)
others = st.sampled_from(
    [
        None,
        True,
        False,
        "",
        "5",
        "text",
        "\ud800",
        "\x00",
        "x" * 5000,
        b"5",
        (),
        [],
        {},
        [None],
        [[]],
        {"a": 1},
        {5: 1},
        object(),
        3j,
        Decimal("5"),
        Decimal("0.5"),
        Decimal("1E+1000000"),
        Decimal("sNaN"),
        Fraction(1, 2),
        iter([5]),
        frozenset({5}),
        range(3),
        type,
    ]
)
anything = integers | floats | numpy_values | others
# n between these and the most that is taken is honest work, and much of it.
outputs = st.integers(-2, 3) | st.sampled_from([2**31, 2**40, 2**63, 10**400, 16385, 2.0, np.int64(2)])
counts = st.integers(-2, 40) | integers
token_ids = st.lists(st.integers(-2, VOCAB + 2) | integers, max_size=6)
many_tokens = st.sampled_from([list(range(VOCAB)), [5] * 100_000, list(range(3, VOCAB)) * 100, np.arange(5, 40)])
numbers = st.floats(0, 2) | floats
words = st.lists(st.text(max_size=6), max_size=4) | st.text(max_size=6)
many_words = st.sampled_from([["w" * 100_000], [f"w{number}" for number in range(20_000)], ["the", "hello world"]])
schemas = st.sampled_from(
    [{"type": "integer"}, {"type": "object", "properties": {"a": {"type": "string"}}}, "{}", "{", {}]
)

repetition = st.fixed_dictionaries(
    {}, optional={field.name: counts | anything for field in dataclasses.fields(RepetitionDetectionParams)}
)
FORMS: dict[str, st.SearchStrategy[Any]] = {
    "json": schemas | anything,
    "regex": st.sampled_from(["[ab]{1,9}", "(", "a" * 3000]) | anything,
    "choice": words | anything,
    "grammar": st.sampled_from(['start: "a"', "root ::= 'a'", "start:"]) | anything,
    "json_object": st.booleans() | anything,
    "structural_tag": anything,
    "disable_any_whitespace": st.booleans() | anything,
    "disable_additional_properties": st.booleans() | anything,
    "whitespace_pattern": st.sampled_from([" ?", "("]) | anything,
}
forms = st.dictionaries(st.sampled_from([*FORMS]), st.none(), max_size=2).flatmap(
    lambda names: st.fixed_dictionaries({name: FORMS[name] for name in names})
)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "n": outputs,
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature"), numbers),
    **dict.fromkeys(("top_p", "min_p"), numbers),
    **dict.fromkeys(("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"), counts),
    **dict.fromkeys(("prompt_logprob_start", "thinking_token_budget", "truncate_prompt_tokens"), counts),
    **dict.fromkeys(("stream_interval", "output_kind"), counts),
    **dict.fromkeys(("stop", "bad_words"), words | many_words),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "logprob_token_ids"), token_ids | many_tokens),
    "prompt_logprob_token_ids": token_ids | many_tokens | st.lists(token_ids, max_size=4),
    **dict.fromkeys(("ignore_eos", "flat_logprobs", "detokenize", "skip_special_tokens"), st.booleans()),
    **dict.fromkeys(("spaces_between_special_tokens", "include_stop_str_in_output"), st.booleans()),
    "skip_reading_prefix_cache": st.booleans(),
    "logit_bias": st.dictionaries(
        st.integers(-2, VOCAB + 2) | integers | st.text("059", max_size=3), numbers, max_size=5
    ),
    "extra_args": st.dictionaries(st.text(max_size=3), others, max_size=2),
    **dict.fromkeys(("structured_outputs", "guided_decoding"), forms),
    "repetition_detection": repetition,
}
POOLING: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("truncate_prompt_tokens", "dimensions", "step_tag_id"), counts),
    **dict.fromkeys(("normalize", "use_activation", "softmax", "activation"), st.booleans()),
    "returned_token_ids": token_ids,
    "skip_reading_prefix_cache": st.booleans(),
    "task": st.sampled_from(POOLING_TASKS),
}
BEAMS: dict[str, st.SearchStrategy[Any]] = {
    "beam_width": st.integers(-1, 18),
    "max_tokens": counts,
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output"), st.booleans()),
    **dict.fromkeys(("temperature", "length_penalty"), numbers),
    "structured_outputs": forms,
    "allowed_token_ids": token_ids | many_tokens,
    "rules": st.sampled_from(["vllm", "transformers"]),
    "early_stopping": st.sampled_from([True, False, "never"]),
}
ADAPTER = {
    "lora_name": anything,
    "lora_int_id": anything,
    "base_model_name": anything,
    "load_inplace": anything,
    "is_3d_lora_weight": anything,
    "lora_path": anything | st.sampled_from(["/nowhere", "x" * 300]),
}
PROMPT = st.sampled_from(
    ["hello world", "", "a" * 200_000, [5, 6, 7], [], [2**31], np.array([5, 6]), np.array([2**63]), {}]
)


def with_anything(
    fields: Mapping[str, st.SearchStrategy[Any]], names: st.SearchStrategy[Any]
) -> st.SearchStrategy[Any]:
    """Some of the fields, each with a value of its own kind or, at times, any value."""
    return st.lists(names, max_size=4, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: fields[name] | fields[name] | anything if name != "n" else fields[name] for name in chosen}
        )
    )


def fields_of(strategies: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    return with_anything(strategies, st.sampled_from([*strategies]))


sampling = fields_of(SAMPLING) | anything
adapters = st.none() | st.fixed_dictionaries(ADAPTER)


def run_cases(count: int, check: Callable[[Any], None], cases: st.SearchStrategy[Any]) -> None:
    """Have hypothesis check so many cases, the same ones each time where there are few."""
    settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 1000,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )(given(cases)(check))()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> str:
    folder = tiny_model("llama", num_hidden_layers=1)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model, device="cpu", max_model_len=32, max_num_seqs=8, enable_lora=True, steps_ahead=1)


GOOD = [
    {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "max_tokens": 5, "ignore_eos": True},
]


def neighbours(llm: LLM) -> list[list[int]]:
    results = llm.generate(["hello world", "the fox"], GOOD, use_tqdm=False)
    return [result.outputs[0].token_ids for result in results]


def assert_short(error: str) -> None:
    assert len(error) <= LONGEST_ERROR, error[:200]


def whole_engine(llm: LLM) -> Engine:
    engine = llm._engine
    assert isinstance(engine, Engine)
    engine.check_integrity()
    assert not engine.has_unfinished()
    return engine


@pytest.mark.parametrize(
    ("strategies", "kind"),
    [
        (SAMPLING, SamplingParams),
        (FORMS, StructuredOutputsParams),
        (BEAMS, BeamSearchParams),
        (ADAPTER, LoRARequest),
    ],
)
def test_every_field_is_fuzzed(strategies: Mapping[str, Any], kind: Any) -> None:
    assert {*strategies} == {field.name for field in dataclasses.fields(kind)}


def test_every_field_of_pooling_is_fuzzed() -> None:
    fields = {field.name for field in dataclasses.fields(PoolingParams)}
    assert {*POOLING} | {"extra_kwargs"} == fields


@pytest.mark.parametrize("count", CASES)
def test_sampling_parameters_of_any_values(llm: LLM, count: int) -> None:
    expected, outcomes = neighbours(llm), Counter[str]()

    def check(case: list[tuple[Any, Any, Any]]) -> None:
        prompts: list[Any] = ["hello world", "the fox", *(prompt for prompt, _, _ in case)]
        requests = [None, None, *(read_adapter(adapter) for _, _, adapter in case)]
        params = [*GOOD, *(params for _, params, _ in case)]
        results = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        assert [result.outputs[0].token_ids for result in results[:2]] == expected
        for result in results[2:]:
            assert_short(result.error or "")
            assert (result.error is None) == bool(result.outputs)
            outcomes["error" if result.error else "result"] += 1
        whole_engine(llm)

    run_cases(count, check, st.lists(st.tuples(PROMPT, sampling, adapters), min_size=4, max_size=4))
    assert neighbours(llm) == expected
    assert_mixed(outcomes, count)


def assert_mixed(outcomes: Counter[str], count: int) -> None:
    """The cases say something: neither all nor none of them could be run."""
    print(dict(outcomes))
    assert all(outcomes[kind] > count // 10 for kind in ("result", "error")), outcomes


def read_adapter(given: Any) -> LoRARequest | None:
    if given is None:
        return None
    try:
        return LoRARequest(**given)
    except ValueError as error:
        assert_short(str(error))
        return None


@pytest.mark.parametrize("count", CASES)
def test_beam_searches_of_any_values(llm: LLM, count: int) -> None:
    expected, outcomes = neighbours(llm), Counter[str]()

    def check(params: Any) -> None:
        try:
            results = llm.beam_search(["hello world", ""], params)
            outcomes.update("error" if result.error else "result" for result in results)
            assert len(results) == 2
        except ValueError as error:
            assert_short(str(error))
        whole_engine(llm)

    needed = {"beam_width": st.integers(1, 8), "max_tokens": st.integers(1, 5)}
    run_cases(count // 5, check, st.tuples(st.fixed_dictionaries(needed), fields_of(BEAMS)).map(merged) | anything)
    assert neighbours(llm) == expected
    assert outcomes["result"] > count // 50, outcomes


def merged(parts: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return parts[0] | parts[1]


def embedding_of(result: Any) -> list[float]:
    vector: list[float] = result.outputs.embedding
    return vector


@pytest.mark.parametrize("count", CASES)
def test_pooling_parameters_of_any_values(tmp_path: Path, count: int) -> None:
    save_pooling_model(tmp_path, "bert", num_hidden_layers=1)
    save_pair_tokenizer(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", runner="pooling")
    outcomes = Counter[str]()
    expected = [embedding_of(output) for output in llm.embed(POOLED, use_tqdm=False)]

    def check(case: list[tuple[Any, Any]]) -> None:
        params: list[Any] = [None, None, *(params for _, params in case)]
        results = llm.embed([*POOLED, *(prompt for prompt, _ in case)], pooling_params=params, use_tqdm=False)
        for result, vector in zip(results, expected, strict=False):
            assert np.allclose(embedding_of(result), vector, atol=1e-5)
        for result in results[2:]:
            assert_short(result.error or "")
            assert (result.error is None) == bool(result.outputs)
            outcomes["error" if result.error else "result"] += 1
        assert llm._engine is not None and not llm._engine.has_unfinished()

    run_cases(count, check, st.lists(st.tuples(PROMPT, fields_of(POOLING) | anything), min_size=4, max_size=4))
    assert_mixed(outcomes, count)


ROW = {
    "prompt": PROMPT | anything,
    "messages": anything
    | st.just([{"role": "user", "content": "hello"}])
    | st.just([{"role": "user", "content": "a" * 200_000}]),
    "tokenized_prompt": token_ids | anything,
    "tools": anything,
    "chat_template_kwargs": anything,
    "model": anything,
    "sampling_params": sampling,
}


@pytest.mark.parametrize("count", CASES)
def test_rows_of_any_values(model: str, count: int) -> None:
    engine = Engine(EngineConfig(model=model, device="cpu", max_model_len=32, max_num_seqs=8), load_tokenizer(model))
    thread = EngineThread(engine)
    replica = Replica("m", {}, lambda source, kwargs: (thread, {}))
    replica.start()
    good = [
        {"prompt": prompt, "sampling_params": params}
        for prompt, params in zip(("hello world", "the fox"), GOOD, strict=True)
    ]
    config = EngineConfig(model=model, max_model_len=32)
    expected: list[list[int]] = []
    outcomes = Counter[str]()

    def check(case: list[Any]) -> None:
        made = [*good, *case]
        rows = pa.table({"id": list(range(len(made)))})
        requests, _ = prepared(rows, model, preprocess=lambda row: made[row["id"]], keep_going=True, engine=config)
        cells = {index: pack(one) for index, one in enumerate(requests) if one.error is None}
        for one in requests:
            assert_short(one.error or "")
            outcomes["error"] += one.error is not None
            assert one.error is not None or one.prompt_token_ids is not None
        replica.feed([(index, (sampling_key(0, requests[index].digest), cell)) for index, cell in cells.items()])
        found: dict[int, Any] = {}
        while len(found) < len(cells):
            collected = replica.collect(5.0)
            assert collected.death is None
            found |= {one.row_id: unpack(one.cell) for one in collected.outcomes}
        for one in found.values():
            assert_short(one.error or "")
            assert one.error is not None or one.output is not None
            outcomes["error" if one.error else "result"] += 1
        tokens = [found[index].output.outputs[0].token_ids for index in (0, 1)]
        expected[:] = expected or tokens
        assert tokens == expected
        engine.check_integrity()

    try:
        run_cases(count, check, st.lists(fields_of(ROW) | anything, min_size=4, max_size=4))
    finally:
        thread.shutdown()
    assert_mixed(outcomes, count)
