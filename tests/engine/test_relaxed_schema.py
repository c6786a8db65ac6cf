"""Schemas with keywords that grammars cannot enforce: as little as possible is relaxed, and told once."""

from __future__ import annotations

import datetime
import json
import logging
import random
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from llguidance.numpy import fill_next_token_bitmask
from pydantic import BaseModel, ConfigDict, Field, FilePath, HttpUrl, SecretStr, conlist, create_model
from transformers import AutoTokenizer

from raydata_llm.engine.grammar import GrammarCompiler
from raydata_llm.engine.structured_outputs import StructuredOutputsParams
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

pytest.importorskip("jsonschema", reason="jsonschema, which the tests judge outputs with, is not installed")
import jsonschema

EOS = 2
NO_SPACE: dict[str, Any] = {"disable_any_whitespace": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, len(tokenizer), (EOS,))
    yield made
    made.shutdown()


def accepts(compiler: GrammarCompiler, tokenizer: Any, schema: Any, value: Any, **style: Any) -> bool:
    """Whether the grammar of a schema lets a value be written, and end there."""
    params = StructuredOutputsParams(json=schema, **NO_SPACE, **style)
    guide = compiler.compile(params, 1).result()()
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(guide.matcher.try_consume_tokens(token_ids) == len(token_ids) and guide.matcher.is_accepting())


def walk(compiler: GrammarCompiler, tokenizer: Any, params: StructuredOutputsParams, seed: int) -> str | None:
    """A text drawn at random from what the masks allow; None if it does not end soon."""
    draw, matcher = random.Random(seed), compiler.compile(params, 1).result()().matcher
    words, written = np.zeros((1, -(-len(tokenizer) // 32)), dtype=np.int32), list[int]()
    for _ in range(400):
        fill_next_token_bitmask(matcher, words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        assert allowed, matcher.get_error()
        # Strings go on for ever otherwise: their end, and the output's, are taken where they can be.
        ends = [one for one in allowed if one == EOS or tokenizer.decode([one])[-1:] in '"]}']
        token_id = draw.choice(ends) if ends and draw.random() < 0.6 else draw.choice(allowed)
        assert matcher.consume_token(token_id)
        if token_id == EOS:
            return str(tokenizer.decode(written))
        written.append(token_id)
    return None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    tags: set[Literal["a", "b"]]


class Everything(BaseModel):
    """Most of what pydantic writes."""

    model_config = ConfigDict(extra="forbid")

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    price: Decimal
    cents: Annotated[Decimal, Field(max_digits=5, decimal_places=2)]
    when: datetime.datetime
    day: datetime.date
    span: datetime.timedelta
    key: uuid.UUID
    site: HttpUrl
    path: FilePath
    secret: SecretStr
    raw: bytes
    maybe: bool | None = None
    even: Annotated[int, Field(multiple_of=2, lt=100)]
    few: frozenset[int]
    pair: tuple[int, Literal["x"]]
    two: conlist(bool, min_length=2, max_length=2)  # type: ignore[valid-type]
    scores: dict[Literal["p", "q"], bool]


def test_the_schemas_that_pydantic_writes_hold_but_for_what_is_relaxed(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    schema = Everything.model_json_schema()
    params = StructuredOutputsParams(json=Everything, disable_any_whitespace=True)
    checked = {key: value for key, value in schema.items()}
    ended = [text for seed in range(25) if (text := walk(compiler, tokenizer, params, seed)) is not None]
    assert len(ended) > 8
    # jsonschema checks no format; sets, names of keys and look-around are what a grammar cannot hold an output to.
    loose = json.loads(json.dumps(checked))
    for definition in (*loose["$defs"].values(), loose):
        for value in definition["properties"].values():
            value.pop("uniqueItems", None)
            value.pop("propertyNames", None)
            value.pop("pattern", None)
            for one in value.get("anyOf", ()):
                one.pop("pattern", None)
    for text in ended:
        jsonschema.validate(json.loads(text), loose)


RELAXED: dict[str, tuple[Any, list[Any], list[Any]]] = {
    # schema, what it allows (all of it must stay allowed), what must stay forbidden
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [[], [1, 2]], [["a"], 1]),
    "format=path": ({"type": "string", "format": "path", "maxLength": 3}, ["abc"], ["abcd", 1]),
    "not": ({"type": "integer", "not": {"const": 3}, "minimum": 0}, [4], [-1]),
    "if": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
            "additionalProperties": False,
            "if": {"properties": {"a": {"const": 1}}},
            "then": {"required": ["b"]},
        },
        [{"a": 1, "b": True}, {"a": 2}],
        [{"a": "x"}, {"c": 1}],
    ),
    "contains": ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}}, [[1, 2]], [["a"]]),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "dependentRequired": {"a": ["b"]}},
        [{"a": 1, "b": 2}, {"b": 2}],
        [{"a": 2}],
    ),
    "propertyNames": (
        {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "integer"}},
        [{"ab": 1}],
        [{"ab": "x"}],
    ),
    "oneOf": (
        {"oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}], "title": "t"},
        [7, 1],
        ["a", 1.5],
    ),
    "oneOf beside anyOf": (
        {
            "oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}],
            "anyOf": [{"enum": [1, 7, "x"]}, {"enum": [8]}],
        },
        [7, 1, 8],
        ["x", 2],
    ),
    "look-around": ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ["-0.5", "12"], ["1a", 3]),
    "look-around in part": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,8}|(?=[\d.]{1,11}0*$)\d{0,8}\.\d{0,2}0*)$"},
        ["1.25", "7"],
        ["a", "1.a"],
    ),
    "back-reference": ({"type": "string", "pattern": r"^(a|b)\1$", "maxLength": 2}, ["aa", "bb"], ["aaa", 1]),
    "word border": ({"type": "string", "pattern": r"^\d+\b$"}, ["12"], ["a"]),
    "patternProperties": (
        {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "patternProperties": {"^S_": {"type": "string"}, "_x$": {"minLength": 1}},
            "additionalProperties": False,
        },
        [{"n": 1, "S_x": "a"}, {"S_": "b"}, {}],
        [{"n": "a"}, 1],
    ),
    "patternProperties with look-around": (
        {"type": "object", "patternProperties": {"^(?!x)": {"type": "integer"}}, "additionalProperties": False},
        [{"a": 1}, {}],
        [[], 1],
    ),
    "multipleOf": ({"type": "number", "multipleOf": 0.007, "minimum": 0}, [0.014, 7], [-1, "a"]),
    "wide bounds": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1e300}, [0.5, 3], ["a", None]),
    "huge bounds": ({"type": "integer", "maximum": 10**400, "minimum": 0}, [0, 5], ["a", 1.5]),
    "circular": (
        {
            "$defs": {
                "A": {
                    "type": "object",
                    "properties": {"x": {"allOf": [{"$ref": "#/$defs/A"}], "minProperties": 1}},
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/A",
        },
        [{"x": {"x": {}}}, {}],
        [{"y": 1}, {"x": 1}],
    ),
    "in one branch": (
        {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "array", "uniqueItems": True, "maxItems": 1}]},
        [5, [1]],
        [4, [1, 2]],
    ),
}


@pytest.mark.parametrize("name", RELAXED)
def test_relaxing_never_allows_less_and_keeps_the_rest(name: str, compiler: GrammarCompiler, tokenizer: Any) -> None:
    schema, allowed, forbidden = RELAXED[name]
    for nested, wrap in (
        (schema, lambda value: value),
        ({"type": "array", "items": schema, "minItems": 1}, lambda value: [value]),
    ):
        if nested is not schema and "$defs" in schema:
            continue
        assert all(accepts(compiler, tokenizer, nested, wrap(value)) for value in allowed)
        assert not any(accepts(compiler, tokenizer, nested, wrap(value)) for value in forbidden)


def test_a_property_or_value_named_as_a_keyword_stays(compiler: GrammarCompiler, tokenizer: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"not": {"const": {"uniqueItems": True}}, "if": {"enum": ["contains"]}, "a": {"not": {}}},
        "required": ["not"],
        "additionalProperties": False,
        "uniqueItems": True,
    }
    assert accepts(compiler, tokenizer, schema, {"not": {"uniqueItems": True}, "if": "contains"})
    assert not accepts(compiler, tokenizer, schema, {"not": {}})
    assert not accepts(compiler, tokenizer, schema, {"not": {"uniqueItems": True}, "if": "x"})


def test_closed_objects_stay_closed(compiler: GrammarCompiler, tokenizer: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    assert accepts(compiler, tokenizer, schema, {"a": [], "b": 1})
    assert accepts(compiler, tokenizer, schema, {"a": []}, disable_additional_properties=True)
    assert not accepts(compiler, tokenizer, schema, {"a": [], "b": 1}, disable_additional_properties=True)


def test_the_schemas_of_a_structural_tag_are_relaxed_too(compiler: GrammarCompiler, tokenizer: Any) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}
    tag = {"structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}], "triggers": ["<f"]}
    matcher = compiler.compile(StructuredOutputsParams(structural_tag=tag), 1).result()().matcher
    for text, is_whole in (("<f>[true]</f>", True), ("<f>[1]</f>", False)):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert (matcher.deep_copy().try_consume_tokens(token_ids) == len(token_ids)) == is_whole


def test_what_was_relaxed_is_told_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    compiler = GrammarCompiler(tokenizer, len(tokenizer), (EOS,))
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            schema = {"type": "array", "uniqueItems": True, "maxItems": number}
            compiler.compile(StructuredOutputsParams(json=schema), 1).result()
        compiler.compile(StructuredOutputsParams(json={"type": "array"}), 1).result()
        compiler.compile(StructuredOutputsParams(json={"not": {}, "uniqueItems": True}), 1).result()
    compiler.shutdown()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "enforce uniqueItems of" in told[0] and "enforce not of" in told[1]


@pytest.mark.parametrize(
    ("schema", "cause"),
    [
        ({"type": "foo", "uniqueItems": True}, "Unimplemented keys|foo"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "greater than maximum"),
        ({"type": "string", "minLength": "a"}, "minLength"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
    ],
    ids=str,
)
def test_mistakes_are_errors_still(schema: Any, cause: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match=cause) as refused:
        compiler.compile(StructuredOutputsParams(json=schema), 1).result()
    assert str(refused.value).startswith("structured_outputs: json cannot be compiled: ")
    assert len(str(refused.value).splitlines()) == 1


def test_a_model_of_many_fields_of_every_kind_compiles_in_one_go(compiler: GrammarCompiler, tokenizer: Any) -> None:
    kinds: list[Any] = [set[int], Decimal, SecretStr, datetime.time, Path, bytes, int | str, Literal["a"]]
    fields: dict[str, Any] = {f"f{place}": (kind, ...) for place, kind in enumerate(kinds * 8)}
    params = StructuredOutputsParams(json=create_model("Wide", **fields), disable_any_whitespace=True)
    assert compiler.compile(params, 1).result()() is not None


CLOSED = {"type": "object", "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        (
            {**CLOSED, "properties": {"a": {"type": "integer"}}, "patternProperties": {"^a$": {"minimum": 3}}},
            [{"a": 3}, {}],
            [{"a": 2}, {"a": "x"}, {"b": 3}],
        ),
        (
            {**CLOSED, "patternProperties": {"^(a|b c)$": {"type": "integer"}, "^x": True}},
            [{"a": 1, "b c": 2}, {"xy": "z"}, {}],
            [{"a": "1"}, {"b": 1}, {"a|b c": 1}],
        ),
        (
            {"type": "object", "properties": {"s": {**CLOSED, "patternProperties": {"^(?:a)$": {}}}}},
            [{"s": {"a": 1}}],
            [{"s": {"b": 1}}],
        ),
    ],
    ids=["a property of that name", "several names", "nested"],
)
def test_patterns_of_single_names_leave_a_way_on(
    schema: dict[str, Any], allowed: Any, forbidden: Any, compiler: GrammarCompiler, tokenizer: Any
) -> None:
    assert all(accepts(compiler, tokenizer, schema, value) for value in allowed)
    assert not any(accepts(compiler, tokenizer, schema, value) for value in forbidden)
    for seed in range(40):
        text = walk(compiler, tokenizer, StructuredOutputsParams(json=schema, **NO_SPACE), seed)
        assert text is None or isinstance(json.loads(text), dict)
