"""Credentials, taken out of whatever leaves a process: messages, exceptions, log lines, reprs, reports, metrics.

Owns the ways out. What counts as a credential is said by `secret_names.py` (by its name), `secret_values.py` (values of
this process's environment, however they are written) and `secret_shapes.py` (by its look and place). A text is masked
in the process that makes it, as only that one knows its environment: a `runtime_env` gives workers variables that the
driver does not have.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raydata_llm.engine.secret_names import is_telling
from raydata_llm.engine.secret_shapes import MASK, mask_shapes
from raydata_llm.engine.secret_values import masker_of

__all__ = [
    "MASK",
    "is_telling",
    "mask_error",
    "masked_errors",
    "masked_logger",
    "redact",
    "redact_entry",
    "redact_tree",
]

# Causes of an exception that are looked at, as chains may be circles.
_MOST_CAUSES = 50


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text as it may leave: without credentials, and with half characters (lone surrogates) as `\\ud800`.

    These have no bytes: a worker of Ray dies of an exception that holds one.

    Args:
        text: Anything that is shown or written.
        secrets: Values that are masked beside those of the process's own environment.
    """
    masked = mask_shapes(masker_of(tuple(os.environ.items()), frozenset(secrets)).mask(text))
    return masked if masked.isascii() else masked.encode("utf-8", "backslashreplace").decode("utf-8")


def redact_tree(value: Any, secrets: Sequence[str] = ()) -> Any:
    """A nested value with every text redacted, and what stands under a telling name masked."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        return {
            redact(name, secrets) if isinstance(name, str) else name: redact_entry(name, entry, secrets)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_tree(entry, secrets) for entry in value]
    return value


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
    if redact(_message(error)) != _message(error):
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        error = kind(redact(f"{type(error).__name__}: {_message(error)}"))
    # Its causes or the lines of code in its traceback hold one: they become text.
    error.__cause__, error.__context__ = _MaskedCauses(text), None
    return error.with_traceback(None)


@contextmanager
def masked_errors() -> Iterator[None]:
    """Let exceptions leave this process without credentials: Ray prints them, causes and tracebacks included."""
    try:
        yield
    except Exception as error:
        masked = mask_error(error)
        if masked is error:
            raise
        raise masked from masked.__cause__


def masked_logger(name: str) -> logging.Logger:
    """The logger of this name, whose lines hold no credential."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, _MaskLines) for one in logger.filters):
        logger.addFilter(_MaskLines())
    return logger


class _MaskedCauses(RuntimeError):
    """The causes of an exception, as masked text."""


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
    return redact(text) == text and all(redact(_message(one)) == _message(one) for one in _chain(error))


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        # A user's class that cannot say it shows nothing.
        return ""


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


def redact_entry(name: object, entry: Any, secrets: Sequence[str] = ()) -> Any:
    """A value as it may be seen under its name."""
    if name == "env_vars" and isinstance(entry, Mapping):
        # Of a `runtime_env`: whatever their names are, they are the user's to show.
        return dict.fromkeys(entry, MASK)
    return _masked(entry) if is_telling(name) else redact_tree(entry, secrets)


def _masked(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {name: _masked(inner) for name, inner in entry.items()}
    if isinstance(entry, (list, tuple)):
        return [_masked(inner) for inner in entry]
    # A number under such a name ("stop_token_ids", "seed") is none.
    return MASK if isinstance(entry, (str, bytes)) else entry
