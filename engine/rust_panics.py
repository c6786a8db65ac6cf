"""Panics of libraries written in Rust (tokenizers, llguidance, safetensors), turned into exceptions.

PyO3 raises a panic as a `BaseException`, which handlers of exceptions let pass: one row's text that makes a tokenizer's
pattern backtrack without end would stop the whole job. Its class cannot be imported, as each library has its own.
"""

from __future__ import annotations

from types import TracebackType

_PANICS = "pyo3_runtime"


class RustPanicError(ValueError):
    """A library gave up on what a request brings, which is refused; it can be called again."""


class _NoPanic:
    """A context that raises panics as `RustPanicError`; a class, as it is entered for each token."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and kind.__module__ == _PANICS:
            raise RustPanicError(f"the tokenizer's library panicked: {error}") from error


no_panic = _NoPanic()
