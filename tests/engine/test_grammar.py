"""Grammars' tables are dealt out to many rows, and masks do not depend on who shares a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask
from transformers import AutoTokenizer

from raydata_llm.engine import grammar
from raydata_llm.engine.grammar import GrammarCompiler
from raydata_llm.engine.grammar_slots import GrammarSlots
from raydata_llm.engine.structured_outputs import StructuredOutputsParams
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SCHEMA = {"type": "array", "minItems": 9, "items": {"type": "string", "minLength": 1, "maxLength": 7}}
PARAMS = StructuredOutputsParams(json=SCHEMA)
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def compiler(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrammarCompiler]:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    made = GrammarCompiler(tokenizer, len(tokenizer), (EOS,))
    yield made
    made.shutdown()


def tables_of(compiler: GrammarCompiler, num_rows: int) -> list[int]:
    return [made.result()().table for made in [compiler.compile(PARAMS, 1) for _ in range(num_rows)]]


def test_rows_are_dealt_out_to_some_tables_a_thread(compiler: GrammarCompiler) -> None:
    few = tables_of(compiler, 8)
    assert len(set(few)) == 1
    many = few + tables_of(compiler, 248)
    assert sorted(Counter(many).values()) == [16] * 16


def test_a_grammar_that_compiles_slowly_has_one_table_a_thread(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_QUICK_SECONDS", 0.0)
    assert sorted(Counter(tables_of(compiler, 256)).values()) == [64] * 4


def test_the_tables_used_longest_ago_are_forgotten(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_KEPT", 3)
    forms = [StructuredOutputsParams(choice=[f"a{number}"]) for number in range(4)]
    first = [compiler.compile(form, 1) for form in forms]
    assert compiler.compile(forms[3], 1) is first[3]
    assert compiler.compile(forms[0], 1) is not first[0]


def test_masks_of_slots_are_those_of_each_alone(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """Over outputs drawn at random, with slots of another grammar and of none among them."""
    num_slots = 40
    other = StructuredOutputsParams(regex="[a-c]{1,200}")
    slots = GrammarSlots(num_slots)
    plain = from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=[EOS], slices=[])
    alone: dict[int, LLMatcher] = {}
    for slot in range(num_slots):
        if slot % 5 == 3:
            continue
        params = other if slot % 7 == 2 else PARAMS
        slots.occupy(slot, compiler.compile(params, 1).result()())
        alone[slot] = LLMatcher(plain, _grammar_of(params), log_level=0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        asked = rng.permutation(num_slots)[:31].astype(np.int32)
        words = np.zeros((len(asked), -(-len(tokenizer) // 32)), dtype=np.int32)
        slots.fill(asked, words)
        tokens = np.zeros(len(asked), dtype=np.int32)
        expected = np.zeros_like(words[:1])
        for row, slot in enumerate(asked.tolist()):
            if slot not in alone:
                assert (words[row] == -1).all()
                continue
            fill_next_token_bitmask(alone[slot], expected)
            assert (words[row] == expected[0]).all()
            allowed = np.flatnonzero(np.unpackbits(expected.view(np.uint8), bitorder="little"))
            tokens[row] = rng.choice(allowed[allowed != EOS])
            assert alone[slot].consume_token(int(tokens[row]))
        assert not slots.advance(asked, tokens).any()


def test_ends_and_refused_tokens_are_noted(compiler: GrammarCompiler, tokenizer: Any) -> None:
    slots = GrammarSlots(4)
    guides = [compiler.compile(StructuredOutputsParams(regex="(ab)*"), 1).result()() for _ in range(3)]
    for slot, guide in zip((0, 1, 3), guides, strict=True):
        slots.occupy(slot, guide)
    first, wrong = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("a", "b"))
    order = np.array([3, 2, 1, 0], dtype=np.int32)
    noted = slots.advance(order, np.array([EOS, EOS, wrong, first], dtype=np.int32))
    assert noted.tolist() == [True, False, True, False]
    assert [(guide.ended, guide.error is not None) for guide in guides] == [
        (False, False),
        (False, True),
        (True, False),
    ]
    slots.occupy(1, None)
    assert not slots.advance(order[2:3], np.array([wrong], dtype=np.int32)).any()


def test_an_output_that_cannot_be_completed_is_an_error(
    compiler: GrammarCompiler, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "name_literal_patterns", lambda schema: schema)
    one = {"type": "integer"}
    schema = {"properties": {"a": one}, "patternProperties": {"^a$": one}, "additionalProperties": False}
    guide = compiler.compile(StructuredOutputsParams(json=schema, disable_any_whitespace=True), 1).result()()
    for token_id in tokenizer.encode('{"a":1,', add_special_tokens=False):
        guide.advance(token_id)
    words = np.zeros((1, -(-len(tokenizer) // 32)), dtype=np.int32)
    guide.fill(words, 0)
    assert np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist() == [EOS]
    assert guide.error is None
    guide.advance(EOS)
    assert guide.error is not None and "cannot be completed" in guide.error


def _grammar_of(params: StructuredOutputsParams) -> str:
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    return LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), defaults={"whitespace_flexible": True})


@pytest.mark.parametrize("form", [{"regex": "(a"}, {"grammar": 'start: "a" missing'}], ids=["regex", "grammar"])
def test_a_form_that_cannot_be_compiled_says_so_in_one_line(compiler: GrammarCompiler, form: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"structured_outputs: {next(iter(form))} cannot be compiled: ") as refused:
        compiler.compile(StructuredOutputsParams(**form), 1).result()
    assert len(str(refused.value).splitlines()) == 1


def test_properties_are_written_in_the_order_of_each_schema(compiler: GrammarCompiler, tokenizer: Any) -> None:
    def first_property(names: str) -> list[str]:
        schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": ["a", "b"]}
        guide = compiler.compile(StructuredOutputsParams(json=schema, disable_any_whitespace=True), 1).result()()
        for token_id in tokenizer.encode('{"', add_special_tokens=False):
            guide.advance(token_id)
        token_ids = {name: tokenizer.encode(name, add_special_tokens=False)[0] for name in names}
        return [name for name in names if guide.matcher.deep_copy().consume_token(token_ids[name])]

    assert first_property("ab") == ["a"]
    assert first_property("ba") == ["b"]


@pytest.mark.parametrize("enum", [[np.int64(3)], {3, 4}])
def test_a_schema_that_is_no_json_is_refused_before_anything_is_queued(enum: Any) -> None:
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        StructuredOutputsParams(json={"enum": enum})
