"""JSON schemas that llguidance cannot enforce as they stand, relaxed by as little as makes them compile.

Owns which keywords are left out, or replaced by wider ones, for which refusal. Invariant: whatever the given schema
allows, the relaxed one allows too. Knows no tokenizer: it is handed a function that says why a schema does not compile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any] | bool
# Why a schema does not compile; None if it does.
FindError = Callable[[Any], str | None]
_Change = Callable[[dict[str, Any]], dict[str, Any]]

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
# Not those whose relaxing would allow less: `not`, `if` and `contains` are left out as a whole or kept.
_SINGLE_SCHEMAS = ("items", "additionalProperties", "additionalItems", "propertyNames", "unevaluatedProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# Each refusal names one kind of keyword; more kinds than that no schema has.
_MOST_ROUNDS = 64
# Names without characters that mean something in a pattern: one, or some with bars between.
_LITERALS = re.compile(r"\^([\w -]+)\$|\^\((?:\?:)?([\w -]+(?:\|[\w -]+)*)\)\$")
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")


def relax(schema: Schema, find_error: FindError) -> tuple[Schema, tuple[str, ...]]:
    """The schema, relaxed until it compiles, and the keywords that were relaxed.

    Args:
        schema: At most as deep as `structured_outputs` allows.

    Raises:
        ValueError: saying why it does not compile, if relaxing does not help.
    """
    relaxed: dict[str, None] = {}
    refusal = find_error(schema)
    for _ in range(_MOST_ROUNDS):
        error = find_error(schema)
        if error is None:
            return schema, tuple(relaxed)
        found: dict[str, None] = {}
        changed = _walk(schema, _change_for(error, found, find_error))
        if not found:
            break
        schema, relaxed = changed, relaxed | found
    raise ValueError(refusal)


def name_literal_patterns(schema: Any) -> Any:
    """The same schema, its patterns that fit single names (`^a$`, `^(a|b)$`) as properties of these names.

    llguidance takes a pattern whose names are all written for one that may go on, and then has no way on.
    """
    return _walk(schema, _with_literal_names)


def _with_literal_names(node: dict[str, Any]) -> dict[str, Any]:
    patterns, given = node.get("patternProperties"), node.get("properties", {})
    if not isinstance(patterns, Mapping) or not isinstance(given, Mapping):
        return node
    named, kept = dict(given), {}
    for pattern, schema in patterns.items():
        literal = _LITERALS.fullmatch(pattern)
        if literal is None:
            kept[pattern] = schema
            continue
        for name in (literal[1] or literal[2]).split("|"):
            own = named.get(name, True)
            named[name] = schema if own is True else own if schema is True else {"allOf": [own, schema]}
    if len(kept) == len(patterns):
        return node
    rest = {name: value for name, value in node.items() if name not in ("properties", "patternProperties")}
    return {**rest, "properties": named, **({"patternProperties": kept} if kept else {})}


def _change_for(error: str, found: dict[str, None], find_error: FindError) -> _Change:
    """What to do to each subschema; notes in `found` what was relaxed."""
    unknown = re.search(r"Unimplemented keys: (\[.*?\])", error)
    if unknown:
        names = set(json.loads(unknown[1]))
        return lambda node: _without(node, names & node.keys(), found)
    unknown_format = re.search(r"Unknown format: (.*)", error)
    if unknown_format:
        name = unknown_format[1].strip()
        return lambda node: _without_format(node, name, found)
    if "oneOf constraints" in error:
        return lambda node: _any_instead_of_one(node, found)
    if "patternProperty regexes" in error:
        return lambda node: _without_patterns(node, found, find_error, overlapping=True)
    circular = re.search(r"circular references with sibling keys are not supported: [^#\s]*(#\S*)", error)
    if circular:
        target = circular[1]
        return lambda node: _reference_alone(node, target, found)
    if "Unsatisfiable" in error:
        return lambda node: node
    return lambda node: _without_refused(node, found, find_error)


def _walk(schema: Any, change: _Change) -> Any:
    """The schema with each of its subschemas, the inner ones first, as `change` makes it."""
    if not isinstance(schema, Mapping):
        return schema
    node = dict(schema)
    for name in _NAMED_SCHEMAS:
        if isinstance(node.get(name), Mapping):
            node[name] = {key: _walk(value, change) for key, value in node[name].items()}
    for name in (*_LISTED_SCHEMAS, *_SINGLE_SCHEMAS):
        value = node.get(name)
        if isinstance(value, list | tuple):
            node[name] = [_walk(one, change) for one in value]
        elif isinstance(value, Mapping):
            node[name] = _walk(value, change)
    return change(node)


def _without(node: dict[str, Any], names: set[str], found: dict[str, None]) -> dict[str, Any]:
    found |= dict.fromkeys(sorted(names))
    return {name: value for name, value in node.items() if name not in names}


def _without_format(node: dict[str, Any], name: str, found: dict[str, None]) -> dict[str, Any]:
    if node.get("format") != name:
        return node
    found[f"format={name}"] = None
    return {key: value for key, value in node.items() if key != "format"}


def _any_instead_of_one(node: dict[str, Any], found: dict[str, None]) -> dict[str, Any]:
    """Alternatives that may overlap: one of them at least."""
    if "oneOf" not in node:
        return node
    alternatives = {"anyOf": node["oneOf"]}
    rest = _without(node, {"oneOf"}, found)
    return {**rest, **alternatives} if "anyOf" not in rest else {"allOf": [rest, alternatives]}


def _without_patterns(
    node: dict[str, Any], found: dict[str, None], find_error: FindError, *, overlapping: bool = False
) -> dict[str, Any]:
    """Without the patterns of names that are refused; properties of such names are then like any other."""
    patterns = node.get("patternProperties")
    if not isinstance(patterns, Mapping):
        return node
    is_refused = overlapping and len(patterns) > 1
    if not is_refused and not any(_is_refused({"type": "string", "pattern": one}, find_error) for one in patterns):
        return node
    return _without(node, {"patternProperties", "additionalProperties"} & node.keys(), found)


def _reference_alone(node: dict[str, Any], target: str, found: dict[str, None]) -> dict[str, Any]:
    """A reference to `target` without what stands beside it, which it would have to be merged with."""
    joined = node.get("allOf")
    references = [node, *(joined if isinstance(joined, list) else ())]
    if not any(isinstance(one, Mapping) and one.get("$ref") == target for one in references):
        return node
    # What only describes, or is referred to, stands for itself.
    kept: dict[str, Any] = {name: node[name] for name in ("$defs", "definitions", "$schema", "$id") if name in node}
    beside = node.keys() - kept.keys() - {"$ref", "title", "description", "default", "examples"}
    if beside == {"allOf"} and len(joined or ()) == 1:
        beside = set()
    if not beside:
        return node
    found |= dict.fromkeys(sorted(f"{name} beside $ref" for name in beside))
    return {**kept, "$ref": target}


def _without_refused(node: dict[str, Any], found: dict[str, None], find_error: FindError) -> dict[str, Any]:
    """Without patterns and bounds that do not compile, each looked at by itself."""
    node = _without_patterns(node, found, find_error)
    if isinstance(node.get("pattern"), str) and _is_refused({"type": "string", "pattern": node["pattern"]}, find_error):
        node = _with_wider_pattern(node, found, find_error)
    kinds = node.get("type")
    kind = "integer" if kinds == "integer" or kinds == ["integer"] else "number"
    for names in (("multipleOf",), _BOUNDS):
        group = {name: node[name] for name in names if name in node}
        if group and _is_refused({"type": kind, **group}, find_error):
            node = _without(node, set(group), found)
    return node


def _is_refused(schema: Schema, find_error: FindError) -> bool:
    """Whether a schema that is valid and can be met does not compile."""
    pattern = schema.get("pattern") if isinstance(schema, Mapping) else None
    try:
        re.compile(pattern or "")
    except (re.error, RecursionError, OverflowError):
        return False
    error = find_error(schema)
    return error is not None and "Unsatisfiable" not in error and "Expected" not in error


def _with_wider_pattern(node: dict[str, Any], found: dict[str, None], find_error: FindError) -> dict[str, Any]:
    """With a pattern that matches more: without look-around, which only forbids, if that compiles; else without any."""
    wider = _without_look_around(node["pattern"])
    found["pattern (look-around)" if "(?" in node["pattern"] else "pattern"] = None
    rest = {name: value for name, value in node.items() if name != "pattern"}
    if wider is None or find_error({"type": "string", "pattern": wider}) is not None:
        return rest
    return {**rest, "pattern": wider}


def _without_look_around(pattern: str) -> str | None:
    """The pattern without its assertions but those of its ends; None if it has none."""
    kept: list[str] = []
    at, in_class, num_dropped = 0, False, 0
    while at < len(pattern):
        if pattern[at] == "\\":
            is_border = pattern[at : at + 2] in (r"\b", r"\B") and not in_class
            kept += [] if is_border else [pattern[at : at + 2]]
            num_dropped += is_border
            at += 2
        elif not in_class and pattern.startswith(_LOOK_AROUND, at):
            at, num_dropped = _group_end(pattern, at), num_dropped + 1
            if pattern[at : at + 1] in ("*", "+", "?", "{"):
                return None  # a repeated assertion; nobody writes one
        else:
            in_class = pattern[at] == "[" or (in_class and pattern[at] != "]")
            kept.append(pattern[at])
            at += 1
    return "".join(kept) if num_dropped else None


def _group_end(pattern: str, start: int) -> int:
    """Where the group that begins at `start` ends."""
    depth, at, in_class = 0, start, False
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif in_class or character == "[":
            in_class = character != "]"
        else:
            depth += (character == "(") - (character == ")")
            if not depth:
                return at + 1
        at += 1
    return len(pattern)
