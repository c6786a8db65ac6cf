"""Take out of a row's values what Arrow did to them for the rows beside it.

A column of a block has one type for all its rows. So Arrow gives a row's dicts the keys of its neighbours' dicts, with
None for values, at every depth, and makes floats of whole numbers where another row has a float. Owns the one reading
of that: a key with None is a key that is not there, and 5.0 is 5. What a user's function made is left as it is: a dict
or list is Arrow's if it is one of those that the row came with.

Invariant: a row's values are the same alone and beside any other rows. Where Arrow keeps no difference (a dict's own
null, a whole float), there is none here.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.structured_outputs import StructuredOutputsParams

_IsArrows = Callable[[object], bool]
# Lists of these alone may be long, and hold nothing to look into: token ids have nothing to take out, vectors whole
# floats.
_EXACT = frozenset((int, str, bool, bytes))
_FLAT = _EXACT | {float, type(None)}


def alone(value: Any) -> Any:
    """A value in the form that tells rows apart: all of it is taken for Arrow's, and an empty dict for none.

    A null struct becomes a struct of nulls where Ray Data joins blocks.
    """
    return _taken_out(value, True, lambda value: True, keep_empty=False)


class ArrowRow:
    """A row's values as the block has them; keeps them alive to know them again.

    Args:
        row: Column names and values, not yet seen by a user's function; None where there is no function, so that all
            values are the row's.
    """

    def __init__(self, row: Mapping[str, Any] | None) -> None:
        self._arrows: dict[int, object] = {}
        self._all = row is None
        for value in (row or {}).values():
            self._remember(value)

    def taken_out(self, value: Any) -> Any:
        """The row's own value, or one that a user's function made of such, without what Arrow did to it."""
        return _taken_out(value, False, self._is_arrows, keep_empty=True)

    def _is_arrows(self, value: object) -> bool:
        return self._all or id(value) in self._arrows

    def _remember(self, value: Any) -> None:
        kind = type(value)
        if kind is not dict and kind is not list:
            return
        self._arrows[id(value)] = value
        if kind is dict:
            for inner in value.values():
                self._remember(inner)
        elif not _has_ints_alone(value) and not _FLAT.issuperset(map(type, value)):
            for inner in value:
                self._remember(inner)


def _taken_out(value: Any, in_arrows: bool, is_arrows: _IsArrows, *, keep_empty: bool) -> Any:
    """The value; `in_arrows` says whether what holds it is Arrow's."""
    kind = type(value)
    if kind is float:
        return int(value) if in_arrows and value.is_integer() else value
    if kind is dict:
        own = is_arrows(value)
        inner = {
            name: _taken_out(one, own, is_arrows, keep_empty=keep_empty)
            for name, one in value.items()
            if one is not None or not own
        }
        return inner if keep_empty else {name: one for name, one in inner.items() if type(one) is not dict or one}
    if kind is list or kind is tuple:
        if _has_ints_alone(value):
            return value
        kinds = set(map(type, value))
        if kinds <= _EXACT:
            return value
        own = is_arrows(value)
        if kinds <= _FLAT:
            return kind(int(one) if type(one) is float and one.is_integer() else one for one in value) if own else value
        return kind(_taken_out(one, own, is_arrows, keep_empty=keep_empty) for one in value)
    if kind is SamplingParams or kind is StructuredOutputsParams:
        return _in_fields(value, is_arrows)
    return value


def _has_ints_alone(values: Any) -> bool:
    """Whether these are whole numbers, as token ids are: found in a fifth of the time that looking at each takes."""
    try:
        array.array("q", values)
    except (TypeError, OverflowError):
        return False
    return True


def _in_fields(params: Any, is_arrows: _IsArrows) -> Any:
    """Parameters that hold a schema of the row's own."""
    names = ("structured_outputs", "extra_args") if type(params) is SamplingParams else ("json", "structural_tag")
    held = {name: getattr(params, name) for name in names if getattr(params, name)}
    changed = {name: _taken_out(value, False, is_arrows, keep_empty=True) for name, value in held.items()}
    return dataclasses.replace(params, **changed) if changed else params
