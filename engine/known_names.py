"""What is said about a name that is not among those known.

Owns the choice of the nearest name. Knows no field. Invariant: whoever mistypes a name is told one that exists.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

_Class = TypeVar("_Class", bound=type)
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")
_NOWHERE: Mapping[str, str] = MappingProxyType({})


def nearest(name: object, known: Collection[str], elsewhere: Mapping[str, str] = _NOWHERE) -> str:
    """The remedy for an unknown name: the one that was meant, or all of them.

    Args:
        elsewhere: Names that are known in another place, and what to do with them.
    """
    if str(name) in elsewhere:
        return elsewhere[str(name)]
    near = difflib.get_close_matches(str(name), known, n=1)
    near = near or sorted(other for other in known if other.startswith(f"{name}_"))
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


def named_arguments(
    function: Callable[_Params, _Result], elsewhere: Mapping[str, str] = _NOWHERE
) -> Callable[_Params, _Result]:
    """Let a function answer an unknown keyword with the nearest known one, as a `ValueError`.

    Args:
        elsewhere: As `nearest`'s.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        for name, value in kwargs.items():
            if name not in known:
                raise ValueError(f"{name}={value!r} is not an argument of {owner}: {nearest(name, known, elsewhere)}")
        return function(*args, **kwargs)

    return call


def named_fields(refused: Mapping[str, str]) -> Callable[[_Class], _Class]:
    """Let a dataclass do what `named_arguments` does.

    Args:
        refused: Names that it does not have on purpose, and what to do instead; None values of theirs are ignored.
    """

    def decorate(kind: _Class) -> _Class:
        take = named_arguments(kind.__init__)  # type: ignore[misc]

        @functools.wraps(take)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in refused.keys() & kwargs.keys():
                value = kwargs.pop(name)
                if value is not None:
                    raise ValueError(f"{name}={value!r} is not supported: {refused[name]}")
            take(self, *args, **kwargs)

        kind.__init__ = init  # type: ignore[misc]
        return kind

    return decorate
