"""What is asked of the engine and what it gives back: plain data, token ids only.

Knows no tensors and no text (importing it must not import torch).
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.failed_outputs import NoOutputs
from raydata_llm.engine.listed_positions import ListedPositions
from raydata_llm.engine.prompt_embeds import Embeds
from raydata_llm.engine.redaction import masked_logger, redact
from raydata_llm.engine.request_stats import RequestStateStats
from raydata_llm.engine.sampling_params import SamplingParams

logger = masked_logger(__name__)

FinishReason = Literal["stop", "length", "abort", "error"]
TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LoRARequest:
    """An adapter that a request asks for.

    Args:
        lora_name: As its user calls it.
        lora_int_id: vLLM's number of it; of no use here.
        lora_path: The adapter's folder; for the engine a local one.
        base_model_name: Taken and not used: an adapter is of the engine's model.
        load_inplace: Taken and not used: an adapter whose files have changed is read anew.
        is_3d_lora_weight: Of adapters of experts, which dense models have none of.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""
    base_model_name: str | None = field(default=None, compare=False, repr=False)
    load_inplace: bool = field(default=False, compare=False, repr=False)
    is_3d_lora_weight: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("lora_name", "lora_path"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid: give text")

    @property
    def name(self) -> str:
        """As `lora_name`."""
        return self.lora_name

    @property
    def path(self) -> str:
        """As `lora_path`."""
        return self.lora_path

    @property
    def adapter_id(self) -> int:
        """As `lora_int_id`."""
        return self.lora_int_id


@dataclass(frozen=True, kw_only=True)
class Request:
    """The immutable ask.

    Args:
        request_id: Chosen by the caller, unique among the engine's unfinished requests.
        prompt_token_ids: At least one token id; left out where there are `prompt_embeds`, then a 0 for each of these.
            The result has the very list, if it is one and is not truncated.
        sampling_params: Complete parameters.
        key: 64-bit key of the sampling noise (`sampling_key`, or `seeded_key`); the draw depends on it, the index in n
            and the position alone.
        lora_request: The adapter it is run with, if any.
        prompt_embeds: The prompt, [tokens, hidden_size], instead of token ids (`prompt_embeds.as_embeds` makes it).
        arrival_time: When it was made, in seconds since 1970.

    Raises:
        ValueError: for both token ids and embeddings.
    """

    request_id: str
    prompt_token_ids: list[int] | TokenArray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    sampling_params: SamplingParams
    key: int = 0
    lora_request: LoRARequest | None = None
    prompt_embeds: Embeds | None = None
    arrival_time: float = field(default_factory=time.time, compare=False)

    def __post_init__(self) -> None:
        if self.prompt_embeds is None:
            return
        if np.any(self.prompt_token_ids):
            raise ValueError("prompt_token_ids and prompt_embeds are both given: give one of them")
        object.__setattr__(self, "prompt_token_ids", np.zeros(len(self.prompt_embeds), dtype=np.int32))

    def refused(self, error: str) -> RequestOutput:
        """The result of a request that cannot be run, its error without credentials."""
        return RequestOutput(
            self.request_id, [int(token_id) for token_id in self.prompt_token_ids], error=redact(error)
        )


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position; `rank` is 1 for the likeliest, None where it is not known."""

    logprob: float
    rank: int | None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's n outputs.

    Args:
        index: Which of the n.
        token_ids: All output tokens, the end token or the tokens that completed a stop string included.
        finish_reason: `stop` (end token or stop string), `length`, `abort` or `error`.
        stop_reason: The stop string or stop token id that ended it, or `repetition_detected`; None for the model's own
            EOS.
        text: Filled in by a front end.
        cumulative_logprob: Sum of the drawn tokens' log-probabilities when `logprobs` was asked.
        logprobs: A position's {token id: Logprob}, when asked; made when it is first read.
        lora_request: The adapter it was written with.
    """

    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: str = ""
    cumulative_logprob: float | None = None
    logprobs: ListedPositions = ListedPositions()  # noqa: RUF009 a field that reads as a list
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        """Whether it has ended (always true of results the engine hands out)."""
        return self.finish_reason is not None


@dataclass(init=False)
class RequestOutput:
    """The result of one request.

    Args:
        request_id: The request's.
        prompt_token_ids: After truncation; a 0 for each position of a prompt of embeddings.
        outputs: The n outputs by index; empty when `error` is set, and reading one of them then says the error.
        error: Why the request could not be run, as `Type: message`.
        prompt: The prompt's text where a front end knows it.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        prompt_logprobs: A prompt position's {token id: Logprob}, when asked; None for the first position.
        prompt_token_id_logprobs: Those of `prompt_logprob_token_ids`, float32 [positions, tokens]: from
            `prompt_logprob_start` to the last position but one.
        lora_request: The adapter it was run with.
        metrics: When it was taken, scheduled and written; None of a request that could not be run.
        finished: Whether every output has ended (always true of results the engine hands out); None: as these say.
        others: Fields of vLLM's that results have not; left out with a warning, so that code written for a later
            vLLM runs.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    error: str | None = None
    prompt: str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: ListedPositions = ListedPositions()  # noqa: RUF009
    prompt_token_id_logprobs: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    lora_request: LoRARequest | None = None
    metrics: RequestStateStats | None = field(default=None, compare=False)

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        outputs: list[CompletionOutput] | None = None,
        error: str | None = None,
        prompt: str | None = None,
        num_cached_tokens: int = 0,
        prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None,
        prompt_token_id_logprobs: npt.NDArray[np.float32] | None = None,
        lora_request: LoRARequest | None = None,
        metrics: RequestStateStats | None = None,
        *,
        finished: bool | None = None,
        **others: Any,
    ) -> None:
        self.request_id, self.prompt_token_ids, self.prompt = request_id, prompt_token_ids, prompt
        self.outputs = [] if outputs is None else outputs
        self.error, self.num_cached_tokens = error, num_cached_tokens
        self.prompt_logprobs, self.prompt_token_id_logprobs = prompt_logprobs, prompt_token_id_logprobs
        self.lora_request, self.metrics = lora_request, metrics
        self._finished = finished
        if error is not None:
            self.fail(error)
        if others:
            _warn_of_fields(tuple(sorted(name for name, value in others.items() if value is not None)))

    def fail(self, error: str) -> None:
        """Make it the result of a request that failed: without outputs."""
        self.outputs, self.error = NoOutputs(error=error), error

    @property
    def finished(self) -> bool:
        """Whether every output has ended (always true of results the engine hands out)."""
        if self._finished is not None:
            return self._finished
        return self.error is not None or all(output.finish_reason is not None for output in self.outputs)


@functools.cache
def _warn_of_fields(names: tuple[str, ...]) -> None:
    if names:
        logger.warning("RequestOutput: left out, as results have no such fields here: %s", ", ".join(names))


def token_array(token_ids: Sequence[int] | TokenArray) -> TokenArray:
    """Token ids as int32.

    Raises:
        ValueError: for a list with anything else.
    """
    if isinstance(token_ids, list):
        packed = bytearray(4 * len(token_ids))
        try:
            # 2,000 in 11 us; NumPy takes 23 to 26.
            struct.pack_into(f"{len(token_ids)}i", packed, 0, *token_ids)
        except struct.error:
            bad = next(token for token in token_ids if not _is_int32(token))
            raise ValueError(f"prompt_token_ids holds {bad!r}: give token ids, integers from 0 on") from None
        return np.frombuffer(packed, dtype=np.int32)
    return np.asarray(token_ids, dtype=np.int32)


def _is_int32(token: object) -> bool:
    try:
        struct.pack("i", token)
    except struct.error:
        return False
    return True


def sampling_key(job_seed: int, row_digest: bytes, occurrence: int = 0) -> int:
    """The 64-bit noise key of a row without a seed of its own.

    Args:
        job_seed: The engine's `seed`.
        row_digest: Digest of what makes the row itself (see `request_digest`).
        occurrence: Its number among identical rows, so that repeated prompts draw differently.
    """
    digest = hashlib.blake2b(row_digest, digest_size=8)
    digest.update(f"{job_seed}/{occurrence}".encode())
    return int.from_bytes(digest.digest(), "little")


def seeded_key(seed: int, prompt_token_ids: Sequence[int] | TokenArray, prompt_embeds: Embeds | None = None) -> int:
    """The 64-bit noise key of a row that names a seed.

    The prompt is part of it: else all prompts with one seed would draw the same noise, and so, where the noise decides,
    the same tokens. Rows that have seed and prompt in common draw alike.
    """
    digest = hashlib.blake2b(f"seed/{seed}/".encode(), digest_size=8)
    digest.update(token_array(prompt_token_ids).tobytes())
    if prompt_embeds is not None:
        digest.update(prompt_embeds.data)
    return int.from_bytes(digest.digest(), "little")


def request_digest(
    prompt_token_ids: Sequence[int] | TokenArray,
    sampling_params: SamplingParams,
    adapter: str = "",
    prompt_embeds: Embeds | None = None,
) -> bytes:
    """A 16-byte digest of prompt, parameters and the adapter's name."""
    digest = hashlib.blake2b(token_array(prompt_token_ids).tobytes(), digest_size=16)
    digest.update(json.dumps(sampling_params.to_mapping(), sort_keys=True, default=str).encode())
    digest.update(adapter.encode())
    if prompt_embeds is not None:
        digest.update(prompt_embeds.data)
    return digest.digest()
