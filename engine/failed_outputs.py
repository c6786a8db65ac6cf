"""The outputs of a prompt that failed: nothing, which says why where a program reads it.

Owns the error that a reader gets in place of an IndexError or AttributeError. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, SupportsIndex, TypeVar

_Item = TypeVar("_Item")


class PromptError(ValueError):
    """A prompt that could not be run, of which the result was read (or that was to stop the call)."""


class NoOutputs(list[_Item]):
    """The empty list of a failed prompt's outputs. Reading one of them raises the prompt's error.

    It equals `[]`, has no length and iterates over nothing.
    """

    def __init__(self, items: Iterable[_Item] = (), *, error: str = "") -> None:
        super().__init__(items)
        self._error = error

    def __getitem__(self, index: Any) -> Any:
        # What copies of it were given is there.
        if len(self) or isinstance(index, slice):
            return super().__getitem__(index)
        raise read_error(self._error)

    def pop(self, index: SupportsIndex = -1) -> _Item:
        """As a list's, with the prompt's error where there is nothing."""
        if not self:
            raise read_error(self._error)
        return super().pop(index)


class NoPooling:
    """The output of a failed prompt of a pooling model: false, and each of its values raises the prompt's error."""

    def __init__(self, error: str) -> None:
        self._error = error

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> NoReturn:
        # Python and its tools ask for names with underscores, and expect an AttributeError.
        if name.startswith("_"):
            raise AttributeError(name)
        raise read_error(self._error)

    def __repr__(self) -> str:
        return f"NoPooling(error={self._error!r})"


def read_error(error: str) -> PromptError:
    """What a reader of a failed prompt's outputs is told."""
    return PromptError(
        f"this prompt has no outputs, as it failed: {error}; look at its result's error before its outputs, or build "
        "the LLM with on_error='raise'"
    )
