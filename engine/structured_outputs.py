"""What form a request's output must have: vLLM's names and meanings.

Owns the checks that need no tokenizer, and the translation into llguidance's grammars. Compiling one is `grammar.py`'s.
Importing this must not import torch or llguidance.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from raydata_llm.engine.known_names import named_fields, nearest
from raydata_llm.engine.param_values import check_text

_FORMS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# Lists and dicts within each other: llguidance reads JSON to this depth.
_MOST_NESTED = 120
# Characters of a form, and of one text that an output must hold whole. A grammar of 1,000,000 characters takes 3 s to
# compile; a text of 100,000 holds up all rows for half a second while its one way is followed to the end.
_MOST_CHARACTERS = {"regex": 100_000, "grammar": 1_000_000, "choice": 10_000_000}
_MOST_SCHEMA = 4_000_000
_MOST_TEXT = 10_000
_MOST_WITHIN = 400_000


@named_fields({})
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one form, and how JSON is written.

    Args:
        json: A JSON schema: a dict, its text, or a pydantic model. OpenAI's `{"name": ..., "schema": ...}` and
            `{"type": "json_schema", "json_schema": ...}` around it are taken off.
        regex: A regular expression that the whole output matches (Rust's syntax: no look-around).
        choice: The output is one of these.
        grammar: A grammar in Lark's syntax or in EBNF as llama.cpp's, with the rule `start` or `root`.
        json_object: Any JSON object.
        structural_tag: Free text in which tags open parts that follow a schema: `{"structures": [{"begin": ...,
            "schema": ..., "end": ...}], "triggers": [...]}`, a dict or its text.
        disable_any_whitespace: No whitespace between JSON's tokens.
        disable_additional_properties: Objects of the schema have no properties but those named.
        whitespace_pattern: A regular expression for whitespace between JSON's tokens.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    json: str | Mapping[str, Any] | Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if not self.json_object:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs has {named} of {', '.join(_FORMS)}: give exactly one")
        if hasattr(self.json, "model_json_schema"):
            object.__setattr__(self, "json", self.json.model_json_schema())
        for name in ("json", "structural_tag"):
            object.__setattr__(self, name, _read_object(name, getattr(self, name)))
        object.__setattr__(self, "json", _unwrapped(self.json))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _bad(name, value, "give non-empty text")
            check_text(f"structured_outputs: {name}", value or "")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool | None):
                raise _bad(name, getattr(self, name), "give True or False")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @classmethod
    def from_value(cls, value: object) -> StructuredOutputsParams:
        """Take a ready object, or a mapping of field names to values (None counts as absent)."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                f"structured_outputs={value!r} is a {type(value).__name__}: "
                'give StructuredOutputsParams or a dict such as {"json": schema}'
            )
        unknown = sorted(set(map(str, value)) - _FIELD_NAMES)
        if unknown:
            hint = nearest(unknown[0], _FIELD_NAMES)
            raise ValueError(f"structured_outputs has unknown field(s) {', '.join(unknown)}: {hint}")
        return cls(**{name: one for name, one in value.items() if one is not None})

    def to_mapping(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as plain JSON values."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    def json_schema(self) -> dict[str, Any] | bool | None:
        """The schema that the output follows, where it is JSON."""
        if self.json_object:
            return {"type": "object"}
        schema: Any = _closed(self.json) if self.disable_additional_properties else self.json
        return None if schema is None else dict(schema) if isinstance(schema, Mapping) else bool(schema)

    @property
    def form(self) -> str:
        """Which of the forms it is."""
        return next(name for name in _FORMS if getattr(self, name) is not None)

    @property
    def has_schema(self) -> bool:
        """Whether a JSON schema is a part of it."""
        return self.json is not None or self.structural_tag is not None

    def with_schemas(self, change: Callable[[Any], Any]) -> StructuredOutputsParams:
        """The same form with its JSON schemas changed."""
        if self.json is not None:
            return replace(self, json=change(self.json_schema()), disable_additional_properties=False)
        tag: Any = self.structural_tag
        structures = [{**one, "schema": change(one["schema"])} for one in self.tags() or ()]
        return replace(self, structural_tag={**tag, "structures": structures})

    def check_size(self) -> None:
        """Check what would take long to compile, or hold up other rows.

        Raises:
            ValueError: naming the form and what it may have at most.
        """
        value = getattr(self, self.form)
        texts = (
            [one for one in _texts_of(value) if len(one) > _MOST_TEXT] if self.form not in ("regex", "grammar") else []
        )
        if texts:
            remedy = f"a text of {len(texts[0])} characters is longer than {_MOST_TEXT} allows: shorten it"
            raise _bad(self.form, texts[0], remedy)
        size = (
            sum(map(len, value))
            if self.choice is not None
            else len(value if isinstance(value, str) else json.dumps(value))
        )
        most = _MOST_CHARACTERS.get(self.form, _MOST_SCHEMA)
        if size > most:
            raise _bad(self.form, value, f"it has {size} characters: give {most} at most")

    def tags(self) -> list[dict[str, Any]] | None:
        """The parts of a structural tag: trigger, begin, schema and end of each."""
        if self.structural_tag is None:
            return None
        tag: Any = self.structural_tag
        structures, triggers = tag.get("structures"), tag.get("triggers")
        if not structures or not triggers:
            remedy = 'give {"structures": [{"begin": ..., "schema": ..., "end": ...}], "triggers": [...]}'
            raise _bad("structural_tag", tag, remedy)
        return [_with_trigger(structure, triggers) for structure in structures]


_FIELD_NAMES = {field.name for field in fields(StructuredOutputsParams)}


def _bad(name: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"structured_outputs: {name}={_SHORT.repr(value)} is not valid: {remedy}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 10
# Not what only describes: an output never holds it.
_DESCRIBING = ("title", "description", "default", "examples", "$comment")


def _check_depth(name: str, value: Any) -> None:
    """Check how deep lists and dicts lie within each other, without recursion of its own.

    Raises:
        ValueError: if it is too deep to be read, or endless.
    """
    level = [value]
    for _ in range(_MOST_NESTED):
        level = [inner for one in level for inner in _within(one)]
        if not level:
            return
        if len(level) > _MOST_WITHIN:  # lists that hold each other more than once grow with each level
            raise _bad(name, value, f"it has more than {_MOST_WITHIN} lists and dicts: give a smaller one")
    remedy = f"it is nested deeper than {_MOST_NESTED} levels: name its inner schemas in $defs, and refer to them"
    raise _bad(name, value, remedy)


def _within(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [one for one in inner if isinstance(one, Mapping | list | tuple)]


def _texts_of(value: Any) -> list[str]:
    """All texts in lists and dicts, the names of these too."""
    texts: list[str] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, Mapping):
            texts += [name for name in one if isinstance(name, str)]
            waiting += [inner for name, inner in one.items() if name not in _DESCRIBING]
        elif isinstance(one, list | tuple):
            waiting += one
    return texts


def _read_object(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except RecursionError as error:
            raise _bad(name, value, f"it is nested deeper than {_MOST_NESTED} levels: use $defs and $ref") from error
        except ValueError as error:
            raise _bad(name, value, f"it is no JSON ({error})") from error
    if isinstance(value, Mapping):
        _check_depth(name, value)
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise _bad(name, value, f"it cannot be written as JSON ({error})") from error
    # true and false are schemas too, of anything and of nothing.
    if value is None or isinstance(value, Mapping) or (name == "json" and isinstance(value, bool)):
        return value
    raise _bad(name, value, "give a dict, or the text of a JSON object")


def _choices(value: Any) -> tuple[str, ...]:
    remedy = "give a list of non-empty strings"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise _bad("choice", value, remedy)
    if not all(isinstance(one, str) and one for one in value):
        raise _bad("choice", value, remedy)
    for one in value:
        check_text("structured_outputs: choice", one)
    return tuple(value)


# What OpenAI's interface puts around a schema. But for `description`, JSON schemas have no keywords of these names.
_WRAPPER = {"name", "schema", "strict", "description"}
_FORMAT = {"type", "json_schema", *_WRAPPER}


def _unwrapped(value: Any) -> Any:
    """The schema itself, without OpenAI's wrappers; whatever has another key is a schema."""
    if not isinstance(value, Mapping):
        return value
    given = {name: one for name, one in value.items() if one is not None}
    if given == {"type": "json_object"}:
        return {"type": "object"}
    if given.get("type") == "json_schema" and given.keys() <= _FORMAT:
        # OpenAI's newer interface has no level between.
        inner = given.get("json_schema", {name: one for name, one in given.items() if name != "type"})
        wrapper = _read_object("json", inner)
        if isinstance(wrapper, Mapping) and wrapper.keys() <= _WRAPPER and "schema" not in wrapper:
            raise _bad("json", value, "it holds no schema: give the schema itself")
        return _unwrapped(wrapper)
    if given.keys() <= _WRAPPER and isinstance(given.get("schema"), str | Mapping | bool):
        return _read_object("json", given["schema"])
    return value


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` wherever it names properties and says nothing of others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {name: value if name in ("const", "enum", "default") else _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), Mapping):
        # A property may have any name, that of a keyword too.
        closed["properties"] = {name: _closed(value) for name, value in schema["properties"].items()}
        closed.setdefault("additionalProperties", False)
    return closed


def _with_trigger(structure: Any, triggers: Sequence[str]) -> dict[str, Any]:
    begin = structure.get("begin") if isinstance(structure, Mapping) else None
    if not isinstance(begin, str) or not begin:
        raise _bad("structural_tag", structure, "each structure needs begin, schema and end")
    trigger = next((one for one in triggers if begin.startswith(one)), None)
    if trigger is None:
        raise _bad("structural_tag", structure, f"no trigger of {list(triggers)} begins its begin={begin!r}")
    return {"trigger": trigger, "begin": begin, "schema": structure.get("schema", {}), "end": structure.get("end", "")}
