"""OpenAI's wrappers around a JSON schema, and text that a form cannot hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raydata_llm import BeamSearchParams, SamplingParams, StructuredOutputsParams

_ASKED = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
_WRAPPED: dict[str, Any] = {
    "name and schema": {"name": "answer", "schema": _ASKED, "strict": True},
    "description": {"name": "answer", "description": "what it is", "schema": _ASKED, "strict": None},
    "schema alone": {"schema": _ASKED},
    "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _ASKED, "strict": True}},
    "newer response_format": {"type": "json_schema", "name": "answer", "schema": _ASKED, "strict": True},
    "schema as text": {"name": "answer", "schema": json.dumps(_ASKED)},
}
_GENUINE: dict[str, Any] = {
    "a property named schema": {"type": "object", "properties": {"schema": {"type": "string"}, "name": {}}},
    "a property named json_schema": {"properties": {"json_schema": {"type": "string"}, "type": {}}},
    "name beside keywords": {"name": "answer", "type": "object", "schema": {"type": "string"}},
    "a constant that looks like one": {"const": {"name": "answer", "schema": {}}},
    "description alone": {"description": "anything"},
    "anything": {},
}


@pytest.mark.parametrize("as_text", [False, True], ids=["dict", "text"])
@pytest.mark.parametrize("form", _WRAPPED)
def test_openais_wrappers_are_taken_off_a_schema(form: str, as_text: bool) -> None:
    given = json.dumps(_WRAPPED[form]) if as_text else _WRAPPED[form]
    asking: Any = {"json": given}
    for asked in (
        StructuredOutputsParams(json=given),
        SamplingParams(structured_outputs=asking).structured_outputs,
        SamplingParams(guided_decoding=asking).structured_outputs,
        BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs=asking).form,
    ):
        assert asked is not None and asked.json_schema() == _ASKED


@pytest.mark.parametrize("schema", _GENUINE)
def test_a_schema_that_only_looks_like_a_wrapper_stays(schema: str) -> None:
    assert StructuredOutputsParams(json=_GENUINE[schema]).json_schema() == _GENUINE[schema]


def test_openais_form_of_any_object_is_one_and_a_wrapper_without_a_schema_is_refused() -> None:
    assert StructuredOutputsParams(json={"type": "json_object"}).json_schema() == {"type": "object"}
    for given in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "answer"}}):
        with pytest.raises(ValueError, match="it holds no schema: give the schema itself"):
            StructuredOutputsParams(json=given)


@pytest.mark.parametrize("form", [{"choice": ["a", "\ud800"]}, {"regex": "a\ud800"}, {"grammar": "\ud800"}], ids=ascii)
def test_half_a_character_in_a_form_is_named(form: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs: \w+ has half a character"):
        StructuredOutputsParams(**form)
