"""Prompts that come as embeddings: a vector a position, in the place of a row of the model's embedding table.

Owns their one form (float32 NumPy: it holds bfloat16 and float16 exactly), what is asked of them, which of them a step
computes, and how the prefix cache knows them. Knows no tensors. Their positions have token id 0, which nothing reads as
a token: it is no part of penalties, guides or cached prefixes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Embeds = npt.NDArray[np.float32]
_REMEDY = "give floating-point numbers of shape [tokens, hidden_size]"
# A block's digest stands behind a number that is no token's, so that no block of tokens is taken for it.
_NO_TOKEN = np.int32(-1).tobytes()
_LEAST_DIGEST_BYTES, _MOST_DIGEST_BYTES = 16, 32


def as_embeds(value: Any) -> Embeds:
    """A prompt's embeddings, [T, hidden], from a tensor, an array or nested lists.

    Raises:
        ValueError: for another shape or type, or numbers that are not finite.
    """
    if hasattr(value, "detach"):
        # A torch tensor: NumPy has no bfloat16.
        value = (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
    elif isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = list(value)  # rows that are arrays, as Arrow's nested lists come
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"prompt_embeds has rows of different lengths: {_REMEDY}") from error
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.dtype.kind != "f" or array.ndim != 2 or not array.size:
        raise ValueError(f"prompt_embeds is {array.dtype} of shape {list(array.shape)}: {_REMEDY}")
    embeds: Embeds = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(embeds).all():
        raise ValueError("prompt_embeds holds numbers that are not finite: leave out or mend such rows")
    return embeds


def check_embeds(embeds: Embeds, *, enabled: bool, hidden_size: int, prompt_logprobs: bool) -> None:
    """Check what the engine and its model say of a prompt's embeddings.

    Raises:
        ValueError: naming the field and the remedy.
    """
    if not enabled:
        raise ValueError("prompt_embeds needs enable_prompt_embeds=True")
    if embeds.shape[1] != hidden_size:
        raise ValueError(
            f"prompt_embeds has {embeds.shape[1]} numbers a token where the model's hidden_size is {hidden_size}: take "
            "them from a model of this size"
        )
    if prompt_logprobs:
        raise ValueError("prompt_logprobs cannot be told of prompt_embeds, which are no tokens: leave it out")


@dataclass(frozen=True)
class EmbeddedTokens:
    """The embeddings that a step computes.

    Args:
        places: [E] int32; their places among the step's prefill tokens.
        values: [E, hidden].
    """

    places: npt.NDArray[np.int32]
    values: Embeds


def embedded_tokens(chunks: Iterable[tuple[Embeds | None, int, int]]) -> EmbeddedTokens | None:
    """Those of a step's chunks, (the prompt's embeddings, first position, number of positions); None of none."""
    places: list[npt.NDArray[np.int32]] = []
    values: list[Embeds] = []
    first = 0
    for embeds, start, count in chunks:
        if embeds is not None and start < len(embeds):
            values.append(embeds[start : start + count])
            places.append(np.arange(first, first + len(values[-1]), dtype=np.int32))
        first += count
    return EmbeddedTokens(np.concatenate(places), np.concatenate(values)) if values else None


def block_keys(embeds: Embeds, outputs: npt.NDArray[np.int32], block_size: int) -> bytes:
    """A sequence's full blocks as the prefix cache compares them, each in the place of its tokens' bytes.

    A block of embeddings is known by a digest of at least 128 bits; blocks too small for one are not shared.

    Args:
        outputs: The tokens after the prompt.
    """
    width = block_size * outputs.itemsize
    digest_bytes = min(width - len(_NO_TOKEN), _MOST_DIGEST_BYTES)
    if digest_bytes < _LEAST_DIGEST_BYTES:
        return b""
    keys = []
    for end in range(block_size, len(embeds) + len(outputs) + 1, block_size):
        vectors = embeds[max(0, end - block_size) : end]
        tokens = outputs[max(0, end - block_size - len(embeds)) : max(0, end - len(embeds))].tobytes()
        if len(vectors):
            digest = hashlib.blake2b(vectors.data, digest_size=digest_bytes, salt=len(vectors).to_bytes(8))
            digest.update(tokens)
            tokens = (_NO_TOKEN + digest.digest()).ljust(width, b"\0")
        keys.append(tokens)
    return b"".join(keys)
