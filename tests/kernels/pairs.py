"""Which of two lists' pairs are tested: all on a GPU, and under the interpreter as many as meet all values of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def pairs(shapes: Sequence[tuple[Any, ...]], settings: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Pairs of a shape and a setting, each as one tuple.

    Interpreted, a case takes a fifth of a second: there each setting meets two shapes, and each shape two settings.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        (*shape, *setting)
        for i, shape in enumerate(shapes)
        for j, setting in enumerate(settings)
        if not interpreted or (i - j) % len(shapes) in (0, 2)
    ]
