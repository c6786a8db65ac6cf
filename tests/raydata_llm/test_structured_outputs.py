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
import pyarrow as pa
import pytest

from raydata_llm import LLM, SamplingParams, StructuredOutputsParams
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.grammar import GrammarCompiler
from raydata_llm.engine.request import RequestOutput
from raydata_llm.tokenizer import load_tokenizer
from tests.raydata_llm.processor_chain import answered
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


LABELS = [f"label {number}" for number in range(5_000)]
QUOTED = {json.dumps(label) for label in LABELS}
CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}
COMPACT: dict[str, Any] = {"disable_any_whitespace": True}
# A form, and all the texts that it allows.
WIDE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "choice": ({"choice": LABELS}, set(LABELS)),
    "enum": ({"json": {"enum": LABELS}}, QUOTED),
    "anyOf of constants": ({"json": {"anyOf": [{"const": label} for label in LABELS]}}, QUOTED),
    "anyOf of objects": (
        {
            "json": {
                "anyOf": [{**CLOSED, "properties": {"k": {"const": n}}, "required": ["k"]} for n in range(2500)],
            },
            **COMPACT,
        },
        {f'{{"k":{number}}}' for number in range(2500)},
    ),
    "many properties": (
        {
            "json": {**CLOSED, "properties": {f"k{n}": {"const": 1} for n in range(2100)}, "maxProperties": 1},
            **COMPACT,
        },
        {"{}"} | {f'{{"k{number}":1}}' for number in range(2100)},
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_thousands_of_alternatives_are_followed_to_their_end(name: str, llm: LLM) -> None:
    form, allowed = WIDE[name]
    results = llm.generate(["hello", "the quick", "dog"], params(max_tokens=60, **form), use_tqdm=False)
    assert [result.error for result in results] == [None] * 3
    texts = texts_that_ended(results)
    assert len(texts) == 3 and set(texts) <= allowed


def test_any_number_of_labels(llm: LLM) -> None:
    labels = [f"label {number}" for number in range(120_000)]
    [result] = llm.generate("hello", params(max_tokens=30, choice=labels), use_tqdm=False)
    assert result.error is None and result.outputs[0].text in set(labels)


def test_labels_with_any_characters(llm: LLM) -> None:
    labels = ['say "x"\\', "two\nlines", "tab\there", "a|b", "/slash/", "☃ naïve", "{}", "\x01", " space", "$x %y"]
    for label in labels:
        [result] = llm.generate("hello", params(choice=[label]), use_tqdm=False)
        assert result.error is None and result.outputs[0].text == label


def nested(depth: int, innermost: Any = True) -> Any:
    for _ in range(depth):
        innermost = {"type": "array", "items": innermost}
    return innermost


def endless() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


def doubled(depth: int) -> Any:
    """Small in memory, and of 2**depth lists as text."""
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"anyOf": [value, value]}
    return value


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "deep": ({"json": nested(2000)}, "json=.* is nested deeper than 120 levels: name its inner schemas in \\$defs"),
    "a little too deep": ({"json": nested(121)}, "nested deeper than 120 levels"),
    "far too deep": ({"json": nested(100_000)}, "nested deeper than 120 levels"),
    "deep text": ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "nested deeper than 120 levels"),
    "deep tag": (
        {"structural_tag": {"structures": [{"begin": "<f", "schema": nested(2000), "end": ""}], "triggers": ["<f"]}},
        "structural_tag=.* nested deeper than 120 levels",
    ),
    "endless": ({"json": endless()}, "nested deeper than 120 levels"),
    "doubled": ({"json": doubled(50)}, "more than 400000 lists and dicts"),
    "huge number": ({"json": '{"maximum": 1' + "0" * 5000 + "}"}, "json="),
    "long regex": ({"regex": "ab" * 100_000}, "regex=.* it has 200000 characters: give 100000 at most"),
    "long label": ({"choice": ["a", "b" * 20_000]}, "choice=.* a text of 20000 characters"),
    "long constant": ({"json": {"const": "b" * 20_000}}, "json=.* a text of 20000 characters"),
    "long grammar": ({"grammar": 'start: "' + "a" * 1_100_000 + '"'}, "grammar=.* give 1000000 at most"),
    "deep grammar": ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar cannot be compiled"),
    "too many rules": (
        {"grammar": "start: r0\n" + "\n".join(f'r{n}: "a" r{n + 1}' for n in range(50_000)) + '\nr50000: "b"'},
        "grammar",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_form_that_is_too_deep_or_too_large_is_that_rows_error(name: str, llm: LLM) -> None:
    form, cause = BAD[name]
    good = {"max_tokens": 5, "structured_outputs": {"choice": ["ab"]}}
    asked: list[Any] = [good, {"structured_outputs": form}, good]
    first, bad, last = llm.generate(["hello"] * 3, asked, use_tqdm=False)
    assert (first.outputs[0].text, last.outputs[0].text) == ("ab", "ab")
    assert bad.error is not None and re.search(cause, bad.error) and len(bad.error) < 1500, bad.error
    assert "\n" not in bad.error


def test_the_deepest_schema_is_followed(llm: LLM) -> None:
    schema = nested(119, {"type": "boolean"})
    [result] = llm.generate("hello", params(max_tokens=250, json=schema), use_tqdm=False)
    assert result.error is None


@pytest.mark.parametrize(
    "form",
    [
        {"grammar": "start: r0\n" + "\n".join(f'r{n}: "a" r{n + 1}?' for n in range(6000)) + '\nr6000: "b"'},
        {
            "json": {
                "$defs": {**{f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(9000)}, "d9000": {"const": 1}},
                "$ref": "#/$defs/d0",
            }
        },
    ],
    ids=["rules", "references"],
)
def test_a_long_chain_does_not_end_the_process(form: dict[str, Any], llm: LLM) -> None:
    """On a thread of 8 MB these were a segmentation fault."""
    [result] = llm.generate("hello", params(max_tokens=5, **form), use_tqdm=False)
    assert result.error is None and result.outputs[0].text


def test_a_rows_deep_schema_is_its_error_row(model_folder: Path) -> None:
    def ask(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "hello", "sampling_params": {"max_tokens": 3, "structured_outputs": row["form"]()}}

    forms = [lambda: {"choice": ["ab"]}, lambda: {"json": nested(2000)}, lambda: {"json": nested(150)}]
    rows = [{"form": form} for form in forms]
    table = answered(
        pa.table({"id": list(range(len(rows)))}),
        str(model_folder),
        lambda row: ask(rows[row["id"]]),
        keep_going=True,
    )
    errors = table.column("__inference_error__").to_pylist()
    assert errors[0] == "" and all(
        "nested deeper than" in error or "recursion" in error.lower() for error in errors[1:]
    )
