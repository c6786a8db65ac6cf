"""Credentials, taken out of whatever leaves a process: messages, exceptions, log lines, reprs, reports, metrics.

Owns the ways out. What counts as a credential is said by `secret_names.py` (by its name), `secret_values.py` (the values
of this process's environment, however they are written) and `secret_shapes.py` (by its look and place). A text is masked
in the process where it is made, as only that one knows its environment: a `runtime_env` may give variables to workers
that the driver does not have.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raydata_llm.secret_names import is_telling
from raydata_llm.secret_shapes import MASK, mask_shapes
from raydata_llm.secret_values import masker_of, secret_values

__all__ = ["MASK", "HiddenVariables", "hide_environment", "is_telling", "mask_environment", "mask_error"]
__all__ += ["masked_errors", "masked_logger", "redact", "redact_tree", "secret_values", "shown"]

# Causes of an exception that are looked at, as chains may be circles.
_MOST_CAUSES = 50


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without credentials.

    Args:
        text: Anything that is shown or written.
        secrets: Values that are masked beside those of the process's own environment.
    """
    return mask_shapes(masker_of(tuple(os.environ.items()), frozenset(secrets)).mask(text))


def redact_tree(value: Any, secrets: Sequence[str] = ()) -> Any:
    """A nested value with every text redacted, and what stands under a telling name masked."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        return {
            redact(name, secrets) if isinstance(name, str) else name: _redact_entry(name, entry, secrets)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_tree(entry, secrets) for entry in value]
    return value


def shown(name: object, value: Any) -> str:
    """A setting's value as messages show it."""
    return repr(_redact_entry(name, value, ()))


def mask_environment(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A `runtime_env` to be shown: the names of its variables, none of their values."""
    if not runtime_env:
        return runtime_env
    shown_env: dict[str, Any] = redact_tree(runtime_env)
    if isinstance(runtime_env.get("env_vars"), Mapping):
        shown_env["env_vars"] = dict.fromkeys(runtime_env["env_vars"], MASK)
    return shown_env


class HiddenVariables(dict[str, str]):
    """Environment variables that show their names alone, for libraries that log whatever they are given."""

    def __repr__(self) -> str:
        return repr(dict.fromkeys(self, MASK))

    __str__ = __repr__


def hide_environment(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """A `runtime_env` to be used: complete, its variables' values hidden from whoever shows it."""
    if not isinstance(runtime_env.get("env_vars"), Mapping):
        return dict(runtime_env)
    return {**runtime_env, "env_vars": HiddenVariables(runtime_env["env_vars"])}


def mask_error(error: BaseException) -> BaseException:
    """An exception whose text, traceback and causes hold no credential.

    It is the same one wherever its text can be changed. Where not, it is a plain error with the masked text of the
    whole chain, a `ValueError` if it was one.
    """
    if _is_clean(error):
        return error
    for one in _chain(error):
        _mask_in_place(one)
    if _is_clean(error):
        return error
    text = redact("".join(traceback.format_exception(error)).strip())
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(f"{redact(f'{type(error).__name__}: {error}')}\n\n{text}")


@contextmanager
def masked_errors() -> Iterator[None]:
    """Let exceptions leave this process without credentials: Ray prints them, causes and tracebacks included."""
    try:
        yield
    except Exception as error:
        masked = mask_error(error)
        if masked is error:
            raise
        raise masked from None


def masked_logger(name: str) -> logging.Logger:
    """The logger of this name, whose lines hold no credential."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, _MaskLines) for one in logger.filters):
        logger.addFilter(_MaskLines())
    return logger


class _MaskLines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            # A call with arguments that do not fit, which logging itself reports.
            return True
        record.msg, record.args = redact(message), None
        if record.exc_info and record.exc_info[1] is not None:
            # What a formatter finds here it takes for the exception's text.
            record.exc_text = redact("".join(traceback.format_exception(record.exc_info[1])).rstrip())
        return True


def _is_clean(error: BaseException) -> bool:
    text = "".join(traceback.format_exception(error))
    return redact(text) == text and all(redact(str(one)) == str(one) for one in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """An exception, its causes and the members of groups."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting and len(found) < _MOST_CAUSES:
        one = waiting.pop()
        if one is not None and not any(one is other for other in found):
            found.append(one)
            waiting += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                waiting += one.exceptions
    return found


def _mask_in_place(error: BaseException) -> None:
    error.args = tuple(_masked_argument(argument) for argument in error.args)
    if isinstance(error, OSError):
        for name in ("strerror", "filename", "filename2"):
            if isinstance(value := getattr(error, name), str):
                setattr(error, name, redact(value))
    for name, value in list(vars(error).items()):
        if isinstance(value, (str, bytes, dict, list, tuple)):
            try:
                setattr(error, name, _masked_argument(value))
            except (AttributeError, TypeError):
                # Read-only: the whole is replaced, see `mask_error`.
                continue


def _masked_argument(value: Any) -> Any:
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        masked = redact(text)
        return value if masked == text else masked.encode("latin-1")
    masked_tree = redact_tree(value)
    return tuple(masked_tree) if isinstance(value, tuple) else masked_tree


def _redact_entry(name: object, entry: Any, secrets: Sequence[str]) -> Any:
    if name == "runtime_env" and isinstance(entry, Mapping):
        return mask_environment(entry)
    return _masked(entry) if is_telling(name) else redact_tree(entry, secrets)


def _masked(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {name: _masked(inner) for name, inner in entry.items()}
    if isinstance(entry, (list, tuple)):
        return [_masked(inner) for inner in entry]
    # A number under such a name ("stop_token_ids", "seed") is none.
    return MASK if isinstance(entry, (str, bytes)) else entry
