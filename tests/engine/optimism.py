"""Admission that believes no row grows, so that rows outgrow the KV memory and are preempted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from raydata_llm.engine.admission import Admission


@contextmanager
def optimistic_admission(wanted: bool = True) -> Iterator[None]:
    """See the module's docstring."""
    if not wanted:
        yield
        return
    with patch.object(Admission, "_keeps_peak", lambda *_: True):
        yield
