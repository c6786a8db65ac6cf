"""Failed rows by kind: what went wrong and where, without the row's own values.

Owns the reading of `__inference_error__` ("Type: message (stage)", written by `row_payload.describe_failure`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from raydata_llm.job_stats import ErrorKind

_TYPE = re.compile(r"[A-Za-z_][\w.]*(?=:)")
_STAGE = re.compile(r"\([a-z_ ]+\)$")
# An example is there to be recognised; whole prompts belong into the error rows.
_EXAMPLE_CHARACTERS = 1000


def error_kind(error: str) -> str:
    """`ValueError (engine)` of `ValueError: the prompt has ... (engine)`."""
    kind, stage = _TYPE.match(error), _STAGE.search(error)
    return f"{kind[0] if kind else 'error'} {stage[0] if stage else ''}".strip()


def error_kinds(errors: Iterable[str | None]) -> dict[str, ErrorKind]:
    """Rows and the first message of each kind; None is a row that did not fail."""
    kinds: dict[str, ErrorKind] = {}
    for error in errors:
        if error is not None:
            kind = error_kind(error)
            known = kinds.get(kind)
            example = error[:_EXAMPLE_CHARACTERS] if known is None else known.example
            kinds[kind] = ErrorKind(1 if known is None else known.rows + 1, example)
    return kinds
