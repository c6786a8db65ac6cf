"""What is asked of a beam search and what it gives back: plain data.

Knows no tensors (importing it must not import torch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from raydata_llm.engine.failed_outputs import NoOutputs
from raydata_llm.engine.known_names import named_fields
from raydata_llm.engine.param_values import (
    LARGEST_COUNT,
    invalid,
    read_flag,
    read_number,
    read_token_ids,
    shown,
    whole_number,
)
from raydata_llm.engine.request import FinishReason, Logprob, LoRARequest, TokenArray
from raydata_llm.engine.structured_outputs import StructuredOutputsParams

MOST_BEAMS = 16
# A length to this power is still a float: 2**20 to the 50th is 1e301.
_MOST_LENGTH_PENALTY = 50.0


@named_fields({})
@dataclass(frozen=True)
class BeamSearchParams:
    """How beams are searched; names and defaults as vLLM's, and two of our own.

    Args:
        beam_width: Sequences kept at each step, and returned; 1 to 16.
        max_tokens: Output tokens at most.
        ignore_eos: Go on past the model's end tokens.
        temperature: Taken and not used, as in vLLM: beams are ranked by the model's own log-probabilities.
        length_penalty: Exponent of the length that scores are divided by; above 0 it favours long sequences.
        include_stop_str_in_output: Whether `text` shows the end token; `tokens` always holds it.
        structured_outputs: The form of every output: `StructuredOutputsParams`, or a dict of its fields. The log-
            probabilities stay the model's own, as with `allowed_token_ids`.
        allowed_token_ids: The only tokens that may follow.
        rules: When a beam is finished, how it is scored and when a search ends, see `beam_rules.py`: "vllm", or
            "transformers" for what `generate(num_beams=...)` of Hugging Face gives.
        early_stopping: Of the rules "transformers": False, True or "never", as there.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    allowed_token_ids: Sequence[int] | None = None
    rules: Literal["vllm", "transformers"] = "vllm"
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        self._check_whole("beam_width", high=MOST_BEAMS)
        self._check_whole("max_tokens")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            object.__setattr__(self, name, read_flag(name, getattr(self, name)))
        object.__setattr__(self, "temperature", read_number("temperature", self.temperature, 0.0, math.inf))
        penalty = read_number("length_penalty", self.length_penalty, -_MOST_LENGTH_PENALTY, _MOST_LENGTH_PENALTY)
        object.__setattr__(self, "length_penalty", penalty)
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams.from_value(self.structured_outputs))
            if self.ignore_eos:
                raise self._wrong("ignore_eos", "an output that has its whole form ends: leave it at False")
        if not isinstance(self.rules, str) or self.rules not in ("vllm", "transformers"):
            raise self._wrong("rules", "choose vllm or transformers")
        if not isinstance(self.early_stopping, (bool, str)) or self.early_stopping not in (True, False, "never"):
            raise self._wrong("early_stopping", "choose True, False or 'never'")
        if self.early_stopping and self.rules == "vllm":
            raise self._wrong("early_stopping", "it is of rules='transformers': set these, or leave it out")
        self._check_allowed()

    @classmethod
    def from_value(cls, value: Any) -> BeamSearchParams:
        """From parameters, or a mapping of their names.

        Raises:
            ValueError: for unknown names, and as the class.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"params={shown(value)} is a {type(value).__name__}: give BeamSearchParams or a dict")
        known = [one.name for one in fields(cls)]
        unknown = [str(name) for name in value if name not in known]
        missing = [name for name in ("beam_width", "max_tokens") if name not in value]
        if unknown:
            raise ValueError(f"params has {unknown[0]}, which beam search does not know: known are {', '.join(known)}")
        if missing:
            raise ValueError(f"params lacks {missing[0]}: give it")
        return cls(**value)

    @property
    def form(self) -> StructuredOutputsParams | None:
        """The form of every output, if there is one."""
        return None if self.structured_outputs is None else StructuredOutputsParams.from_value(self.structured_outputs)

    def _check_whole(self, name: str, high: int | None = None) -> None:
        number = whole_number(getattr(self, name))
        if number is None or number < 1 or (high is not None and number > high):
            raise self._wrong(name, f"give a whole number from 1{'' if high is None else f' to {high}'}")
        object.__setattr__(self, name, min(number, LARGEST_COUNT))

    def _check_allowed(self) -> None:
        if self.allowed_token_ids is None:
            return
        allowed = tuple(dict.fromkeys(read_token_ids("allowed_token_ids", self.allowed_token_ids)))
        if not allowed:
            raise self._wrong("allowed_token_ids", "give a list with at least one token id")
        object.__setattr__(self, "allowed_token_ids", allowed)

    def _wrong(self, name: str, remedy: str) -> ValueError:
        return invalid(name, getattr(self, name), remedy)


@dataclass(frozen=True, kw_only=True)
class BeamRequest:
    """The immutable ask.

    Args:
        request_id: Unique among a search's unfinished requests.
        prompt_token_ids: At least one token id.
        params: How to search.
        lora_request: The adapter it is run with, if any.
    """

    request_id: str
    prompt_token_ids: TokenArray
    params: BeamSearchParams
    lora_request: LoRARequest | None = None


@dataclass
class BeamSearchSequence:
    """One of a prompt's best sequences, with vLLM's names.

    Args:
        tokens: The prompt's and the output's, an end token included.
        logprobs: Of each output position, {token id: Logprob} of the tokens that were looked at.
        lora_request: The adapter it was run with.
        cum_logprob: Sum of the output tokens' log-probabilities.
        text: The text of `tokens`; None without a tokenizer.
        finish_reason: "stop" (an end token) or "length".
        stop_reason: The end token.
        score: What the sequences are sorted by: `cum_logprob` under the length penalty.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    lora_request: LoRARequest | None = None
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float = 0.0


@dataclass
class BeamSearchOutput:
    """The result of one prompt: its best sequences, the best first; or why it could not be run, as `Type: message`."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        if self.error is not None:
            self.sequences = NoOutputs(error=self.error)
