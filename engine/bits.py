"""Sets of tokens as bits, 32 to a word: the form of `kernels/bitmask.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def clear_bits(words: npt.NDArray[np.int32], token_ids: Sequence[int]) -> None:
    """Take tokens out of the set, in place."""
    ids = np.array(token_ids, dtype=np.int64)
    np.bitwise_and.at(words.view(np.uint32), ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))


def keep_only(words: npt.NDArray[np.int32], token_id: int) -> None:
    """Leave one token in the set, in place."""
    words[:] = 0
    words.view(np.uint32)[token_id // 32] = np.uint32(1) << np.uint32(token_id % 32)
