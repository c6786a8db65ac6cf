"""What is asked of a pooling engine and what it gives back, under vLLM's names.

Knows no tensors and no text (importing it must not import torch): inside the engine room results are NumPy arrays, and
`LLM.encode` makes tensors of them, as vLLM's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np

from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.engine.redaction import redact
from raydata_llm.engine.request import TokenArray


@dataclass(frozen=True, kw_only=True)
class PoolingRequest:
    """The immutable ask.

    Args:
        request_id: Chosen by the caller, unique among the engine's unfinished requests.
        prompt_token_ids: At least one token id.
        pooling_params: With a task.
        token_type_ids: Which of two texts each token is of, for encoders that tell them apart; None: all the first.
    """

    request_id: str
    prompt_token_ids: TokenArray
    pooling_params: PoolingParams
    token_type_ids: TokenArray | None = None

    def refused(self, error: str) -> PoolingRequestOutput[PoolingOutput]:
        """The result of a request that cannot be run, its error without credentials."""
        prompt = [int(token_id) for token_id in self.prompt_token_ids]
        return PoolingRequestOutput(self.request_id, None, prompt, error=redact(error))


@dataclass(eq=False)
class PoolingOutput:
    """A result as it is: float32 [values], or [tokens, values] of the tasks that give one result a token."""

    data: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PoolingOutput) and np.array_equal(np.asarray(self.data), np.asarray(other.data))


@dataclass(repr=False)
class EmbeddingOutput:
    """One prompt's embedding."""

    embedding: list[float]

    @classmethod
    def from_base(cls, output: PoolingOutput) -> Self:
        """From a pooled result."""
        return cls(output.data.tolist())

    @property
    def hidden_size(self) -> int:
        """Its number of values."""
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(repr=False)
class ClassificationOutput:
    """One prompt's classes: probabilities, or logits where `use_activation` is False."""

    probs: list[float]

    @classmethod
    def from_base(cls, output: PoolingOutput) -> Self:
        """From a pooled result."""
        return cls(output.data.tolist())

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


@dataclass
class ScoringOutput:
    """How well the two texts of a pair fit together."""

    score: float

    @classmethod
    def from_base(cls, output: PoolingOutput) -> Self:
        """From a pooled result with one value."""
        return cls(output.data.item())


Output = TypeVar("Output")


@dataclass
class PoolingRequestOutput(Generic[Output]):
    """The result of one request.

    Args:
        request_id: The request's.
        outputs: When `error` is set, None of an engine's results; of `LLM`'s, an object whose values say the error.
        prompt_token_ids: After truncation.
        num_cached_tokens: 0: prompts are computed whole.
        finished: Always true of results that are handed out.
        error: Why there is no result, as `Type: message`.
        prompt: The prompt's text where a front end knows it.
    """

    request_id: str
    outputs: Output | None
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    error: str | None = None
    prompt: Any = None


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """The result of `LLM.embed`."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """The result of `LLM.classify`."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """The result of `LLM.score`."""
