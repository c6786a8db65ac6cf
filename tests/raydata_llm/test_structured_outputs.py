"""Outputs have the form that their row asks for: in `LLM`, whatever else is in the batch, and in the processor."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from raydata_llm import LLM, SamplingParams, StructuredOutputsParams
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.grammar import GrammarCompiler
from raydata_llm.engine.request import RequestOutput
from raydata_llm.tokenizer import load_tokenizer
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 64}
EOS = 2


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module", params=[0, 2], ids=["read at once", "launched ahead"])
def llm(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), steps_ahead=request.param, **SETTINGS) as made:
        yield made


def params(max_tokens: int = 60, **structured: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**structured))


def texts_that_ended(results: list[RequestOutput]) -> list[str]:
    outputs = [output for result in results for output in result.outputs]
    assert outputs and {output.finish_reason for output in outputs} <= {"stop", "length"}
    return [output.text for output in outputs if output.finish_reason == "stop"]


def schema_of(seed: int) -> dict[str, Any]:
    """A schema of its own for each seed, whose values are short enough to end."""
    draw = random.Random(seed)
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "boolean"},
        lambda: {"type": "integer", "minimum": 0, "maximum": draw.randint(1, 999)},
        lambda: {"enum": [f"a{draw.randint(0, 99)}", draw.randint(0, 9), None]},
        lambda: {"type": "string", "maxLength": draw.randint(0, 4)},
        lambda: {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        lambda: {"const": {"id": seed}},
    ]
    properties = {f"k{seed}_{place}": draw.choice(kinds)() for place in range(draw.randint(1, 3))}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties)[: draw.randint(1, len(properties))],
        "additionalProperties": False,
    }


def test_a_thousand_rows_each_with_its_own_schema(model_folder: Path) -> None:
    schemas = [schema_of(seed) for seed in range(1000)]
    asked = [params(max_tokens=120, json=schema, disable_any_whitespace=True) for schema in schemas]
    with LLM(str(model_folder), steps_ahead=1, **SETTINGS) as llm:
        results = llm.generate(["hello"] * 1000, asked, use_tqdm=False)
    ended = 0
    for schema, result in zip(schemas, results, strict=True):
        assert result.error is None
        output = result.outputs[0]
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
            ended += 1
    assert ended > 900


def test_choice_regex_and_grammar(llm: LLM) -> None:
    lark = 'start: "[" NUMBER ("," NUMBER)~1..2 "]"\nNUMBER: /[0-9]{1,2}/'
    gbnf = 'root ::= "yes" | "no" " " "really"'
    forms: dict[str, tuple[dict[str, Any], str]] = {
        "choice": ({"choice": ["cat", "naïve ☃", 'say "x"\\']}, 'cat|naïve ☃|say "x"\\\\'),
        "regex": ({"regex": r"[a-f]{3}-[0-9]{2}"}, r"[a-f]{3}-[0-9]{2}"),
        "lark": ({"grammar": lark}, r"\[\d{1,2}(,\d{1,2}){1,2}\]"),
        "gbnf": ({"grammar": gbnf}, "yes|no really"),
    }
    for form, pattern in forms.values():
        ended = texts_that_ended(llm.generate(["hello", "the quick"] * 4, params(**form), use_tqdm=False))
        assert len(ended) == 8
        assert all(re.fullmatch(pattern, text) for text in ended), ended


def test_any_object_and_closed_objects(llm: LLM) -> None:
    for text in texts_that_ended(llm.generate(["hello"] * 8, params(json_object=True), use_tqdm=False)):
        assert isinstance(json.loads(text), dict)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    closed = params(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    ended = texts_that_ended(llm.generate(["hello"] * 8, closed, use_tqdm=False))
    assert len(ended) == 8 and set(ended) <= {"{}", '{"a":true}', '{"a":false}'}


def test_a_structural_tag_holds_only_within_its_tags(llm: LLM) -> None:
    tag = {
        "structures": [{"begin": "q=", "schema": {"type": "boolean"}, "end": ";"}],
        "triggers": ["q"],
    }
    asked = SamplingParams(max_tokens=40, logit_bias={llm.get_tokenizer().convert_tokens_to_ids("q"): 20.0})
    with_tag = SamplingParams.from_mapping({**asked.to_mapping(), "structured_outputs": {"structural_tag": tag}})
    for output in (one.outputs[0] for one in llm.generate(["hello"] * 6, with_tag, use_tqdm=False)):
        parts = re.findall(r"q(?:=(?:true|false);)?", output.text)
        assert parts
        whole = output.text if output.finish_reason == "stop" else output.text[: output.text.rindex("q")]
        assert whole.count("q") == len(re.findall(r"q=(?:true|false);", whole))


@pytest.mark.parametrize(
    ("trigger", "begin", "end"),
    [
        ("<f>", "<f>", "</f>"),  # looks like a special token, and is none of this tokenizer
        ("<f", "<f=1>", "<|user|>"),
        ("<|assistant|>", "<|assistant|>q:", "<|user|>;"),
        ("<|assistant|>", "<|assistant|>", ""),
    ],
)
def test_a_tags_ends_are_text_or_special_tokens(trigger: str, begin: str, end: str, model_folder: Path) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    tag = {"structures": [{"begin": begin, "schema": {"type": "boolean"}, "end": end}], "triggers": [trigger]}
    compiler = GrammarCompiler(tokenizer, 1031, (EOS,))

    def accepted(text: str) -> str:
        """How much of a text the grammar lets be written."""
        matcher = compiler.compile(StructuredOutputsParams(structural_tag=tag), 1).result()().matcher
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return str(tokenizer.decode(token_ids[: matcher.try_consume_tokens(token_ids)]))

    try:
        whole = f"hello {begin}true{end} world {begin}false{end}"
        assert accepted(whole) == whole
        assert accepted(f"hello {begin}maybe") == f"hello {begin}"
        assert accepted(f"hello {begin}true!") == f"hello {begin}true" + ("!" if not end else "")
    finally:
        compiler.shutdown()


def test_unguided_rows_draw_the_same_beside_guided_ones(llm: LLM) -> None:
    free = SamplingParams(max_tokens=30, seed=5)
    alone = llm.generate(["hello"], free, use_tqdm=False)[0].outputs[0].token_ids
    guided = params(regex="[ab]{20}")
    mixed = llm.generate(["hello"] * 5, [guided, guided, free, guided, free], use_tqdm=False)
    assert mixed[2].outputs[0].token_ids == mixed[4].outputs[0].token_ids == alone
    assert all(re.fullmatch("[ab]{20}", mixed[index].outputs[0].text) for index in (0, 1, 3))


def test_a_complete_output_ends_with_the_eos_even_where_it_is_ignored(llm: LLM) -> None:
    for asked in (
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["ab"])),
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["ab"]), ignore_eos=True),
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["ab"]), min_tokens=12),
    ):
        output = llm.generate("hello", asked, use_tqdm=False)[0].outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", None)
        assert output.token_ids[-1] == EOS


def test_min_tokens_puts_the_end_off_while_the_grammar_can_go_on(llm: LLM) -> None:
    asked = SamplingParams(
        structured_outputs=StructuredOutputsParams(regex="a*"), min_tokens=9, max_tokens=30, logit_bias={EOS: 50.0}
    )
    assert llm.generate("hello", asked, use_tqdm=False)[0].outputs[0].text == "a" * 9


def test_logprobs_are_those_before_the_mask(llm: LLM) -> None:
    asked = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["ab"]), logprobs=-1)
    first = llm.generate("hello", asked, use_tqdm=False)[0].outputs[0].logprobs
    assert first is not None and all(entry.logprob > -1e9 for entry in first[0].values())


def test_a_form_that_does_not_compile_is_that_rows_error(llm: LLM) -> None:
    forms: list[dict[str, Any]] = [
        {"json": {"type": "foo"}},
        {"regex": "("},
        {"grammar": "start: missing"},
        {"choice": ["ab"]},
        {"structural_tag": {"structures": [{"begin": "<f", "schema": {}, "end": ""}], "triggers": ["<g"]}},
    ]
    results = llm.generate(["hello"] * len(forms), [params(**form) for form in forms], use_tqdm=False)
    for form, result in zip(forms, results, strict=True):
        [name] = form
        if name == "choice":
            assert result.error is None and result.outputs[0].text == "ab"
        else:
            assert result.error is not None and "structured_outputs: " in result.error and name in result.error
            assert result.outputs == []


def test_a_grammar_and_other_parameters_that_leave_no_token_are_an_error(llm: LLM) -> None:
    asked = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["ab"]), allowed_token_ids=[7])
    result = llm.generate("hello", asked, use_tqdm=False)[0]
    assert result.error is not None and "no token that the grammar allows" in result.error


def test_each_of_n_outputs_follows_the_grammar(llm: LLM) -> None:
    asked = SamplingParams(
        n=16, max_tokens=40, structured_outputs=StructuredOutputsParams(regex="[a-z]{4}"), temperature=2.0
    )
    [result] = llm.generate("hello", asked, use_tqdm=False)
    found = [output.text for output in result.outputs]
    assert len(found) == 16 and all(re.fullmatch("[a-z]{4}", text) for text in found) and len(set(found)) > 8


def test_the_older_name_is_taken(llm: LLM) -> None:
    asked = SamplingParams.from_mapping({"guided_decoding": {"choice": ["yes"], "json": None}})
    assert asked.structured_outputs == StructuredOutputsParams(choice=["yes"])
    assert SamplingParams.from_mapping(asked.to_mapping()) == asked


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "give exactly one"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({"json": "{"}, "json"),
        ({"json": 5}, "json"),
        ({"regex": ""}, "regex"),
        ({"choice": []}, "choice"),
        ({"choice": "ab"}, "choice"),
        ({"choice": ["a", 1]}, "choice"),
        ({"structural_tag": "x"}, "structural_tag"),
        ({"jsn": {}}, "jsn"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace"),
    ],
    ids=str,
)
def test_wrong_forms_name_the_field(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParams(structured_outputs=StructuredOutputsParams.from_value(given))


def test_a_tokenizer_is_needed(model_folder: Path) -> None:
    with LLM(str(model_folder), skip_tokenizer_init=True, **SETTINGS) as llm:
        [result] = llm.generate([[5, 6]], params(choice=["ab"]), use_tqdm=False)
    assert result.error is not None and "tokenizer" in result.error


def test_how_json_is_written_can_be_said_for_all_rows(model_folder: Path) -> None:
    style = {"disable_any_whitespace": True, "disable_additional_properties": True}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 22]}},
        "required": ["a", "b"],
    }
    asked = [params(max_tokens=100, json=schema)] * 20
    with LLM(str(model_folder), structured_outputs_config=style, **SETTINGS) as compact:
        texts = texts_that_ended(compact.generate(["hello"] * 20, asked, use_tqdm=False))
    assert texts and all(re.fullmatch(r'\{"a":(true|false),"b":(1|22)\}', text) for text in texts), texts
    with pytest.raises(ValueError, match=r"structured_outputs_config=.* is not valid"):
        EngineConfig(model="m", structured_outputs_config={"backend": True})
