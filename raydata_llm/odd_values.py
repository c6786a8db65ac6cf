"""Values that a column cannot hold beside those of the other rows.

Arrow has one type a column. Where there is none for all values, Ray Data pickles the whole column, which then fits
neither other blocks nor other programs; and a type nested deeper than Arrow can send ends the job. Owns which values
are to blame: by themselves (text with half a character, numbers past 64 bits, deep nesting), or beside the others of
their column. Values of a class that Arrow does not know stay pickled where most rows have such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from raydata_llm.ray_blocks import columns_to_arrow

# Arrow's IPC, by which Ray sends blocks, takes no more.
MOST_LEVELS = 63
_PICKLED = "ray.data.arrow_pickled_object"
_HOLDERS = (Mapping, list, tuple, set, frozenset)
# A long list of these, token ids say, is not looked into.
_PLAIN = frozenset((int, float, str, bool, bytes, type(None)))


class UnstorableError(TypeError):
    """A column of a block has such values."""


def is_suspect(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold such values."""
    return getattr(kind, "extension_name", "") == _PICKLED or _is_deep(kind)


def why_too_deep(value: object) -> str | None:
    """Why a value is not to be shown to Arrow, which takes its process down with it: nesting without a bottom."""
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        one, level = waiting.pop()
        if not isinstance(one, _HOLDERS):
            continue
        if level == MOST_LEVELS:  # or it holds itself
            return f"is nested deeper than {MOST_LEVELS} levels, the most that a table holds: return it as text"
        inner = one.values() if isinstance(one, Mapping) else one
        if not _PLAIN.issuperset(map(type, inner)):
            waiting += [(part, level + 1) for part in inner]
    return None


def why_unstorable(value: object) -> str | None:
    """Why no column can hold the value, whatever the others are."""
    cause = why_too_deep(value)
    waiting: list[Any] = [value]
    while waiting and cause is None:
        one = waiting.pop()
        if isinstance(one, str):
            if not one.isascii() and any("\ud800" <= letter <= "\udfff" for letter in one):
                cause = "has half a character (a lone surrogate): text.encode(errors='replace').decode() has none"
        elif isinstance(one, int):
            if not -(2**63) <= one < 2**64:
                cause = "has a whole number past 64 bits, which no table can hold: return it as text"
        elif isinstance(one, Mapping):
            waiting += [*one, *one.values()]
        elif isinstance(one, _HOLDERS):
            waiting += one
    return cause


def odd_values(name: str, values: Mapping[int, Any]) -> dict[int, pa.DataType]:
    """The numbers of the rows whose values no column holds together with those of most rows, and the type of these.

    Args:
        values: By row, none of them None.
    """
    if not is_suspect(_column_type(name, list(values.values()))):
        return {}
    alike: dict[str, list[int]] = {}
    for index, value in values.items():
        alike.setdefault(str(_column_type(name, [value])), []).append(index)
    groups = sorted(alike.values(), key=len, reverse=True)
    if is_suspect(_column_type(name, [values[groups[0][0]]])):
        return {}  # of most rows Ray Data pickles it
    kept: list[list[int]] = []
    _keep_together(name, values, groups, kept)
    kind = _column_type(name, [values[group[0]] for group in kept])
    known = {index for group in kept for index in group}
    return {index: kind for index in values if index not in known}


def _keep_together(name: str, values: Mapping[int, Any], groups: Sequence[list[int]], kept: list[list[int]]) -> None:
    """Add to `kept` the groups that one type holds with those before, halving what it does not."""
    together = [values[group[0]] for group in (*kept, *groups)]
    if not is_suspect(_column_type(name, together)):
        kept.extend(groups)
    elif len(groups) > 1:
        half = len(groups) // 2
        _keep_together(name, values, groups[:half], kept)
        _keep_together(name, values, groups[half:], kept)


def _column_type(name: str, values: list[Any]) -> pa.DataType:
    return columns_to_arrow({name: values}).column(0).type


def _is_deep(kind: pa.DataType) -> bool:
    waiting = [(kind, 1)]
    while waiting:
        one, level = waiting.pop()
        if pat.is_nested(one):
            if level > MOST_LEVELS:
                return True
            waiting += [(one.field(number).type, level + 1) for number in range(one.num_fields)]
    return False
