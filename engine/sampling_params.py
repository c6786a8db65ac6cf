"""How one request is sampled: vLLM's names, defaults and meanings.

Owns which values these parameters may have together, and the layering of a row's own values over the model's
`generation_config`; a single value is read by `param_values.py`. Knows no tensors (importing it must not import torch).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from typing import Any

from raydata_llm.engine.known_names import named_fields, nearest
from raydata_llm.engine.param_values import (
    invalid,
    read_bias,
    read_count,
    read_flag,
    read_ids_or_rows,
    read_integer,
    read_number,
    read_strings,
    read_token_ids,
    shown,
)
from raydata_llm.engine.repetition import RepetitionDetectionParams
from raydata_llm.engine.structured_outputs import StructuredOutputsParams


class RequestOutputKind(enum.IntEnum):
    """vLLM's kinds of a stream's outputs; offline there is the last."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


# Of vLLM's fields, its older ones and its server's.
_REFUSED = {
    "best_of": "set n, with logprobs=0, and keep those with the highest cumulative_logprob",
    "use_beam_search": "call LLM.beam_search",
    "logits_processors": "give the engine's logits_processors, and each row's values as extra_args",
    "trace_decode_token_ids": "give the tokens as the prompt's end, and set prompt_logprobs=0",
    "routed_experts_prompt_start": "the engine runs dense models",
    "guided_json": "set structured_outputs={'json': ...}",
    "guided_regex": "set structured_outputs={'regex': ...}",
    "guided_choice": "set structured_outputs={'choice': [...]}",
    "guided_grammar": "set structured_outputs={'grammar': ...}",
    "response_format": "set structured_outputs={'json': schema}, or {'json_object': True}",
    "watermarking": "write it as one of the engine's logits_processors",
}


@named_fields(_REFUSED)
@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """Parameters of one request, as vLLM's class of the same name.

    What is set after it was made is checked when it is used; requests hold copies.

    Args:
        n: How many outputs to draw for the prompt.
        presence_penalty: Subtracted from the logit of each token already in the output.
        frequency_penalty: Subtracted once per occurrence in the output.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output.
        temperature: 0 is greedy.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        top_k: Keep this many most likely tokens; 0 or -1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        seed: Makes the draw depend on (seed, prompt, index in n, position) alone: equal prompts with equal seeds draw
            alike. At most 64 bits; -1 is none.
        stop: A string or strings that end the output; left out of the text unless `include_stop_str_in_output`.
        stop_token_ids: Token ids that end the output.
        ignore_eos: Go on after the model's end-of-sequence tokens.
        max_tokens: Output tokens at most; None means up to the model's length.
        min_tokens: Output tokens before any end is allowed.
        logprobs: How many likeliest tokens' log-probabilities to return a position, besides the drawn one's; -1 is all.
        prompt_logprobs: The same for the prompt's positions, besides the prompt's own tokens.
        prompt_logprob_token_ids: Return the log-probabilities of these tokens at the prompt's positions, as
            `RequestOutput.prompt_token_id_logprobs`: one list for all of them, or a list for each, padded with -1.
        prompt_logprob_start: The first of these positions; what is computed there is about the next token.
        logprob_token_ids: Return the log-probabilities of these tokens (128 at most) instead of the likeliest.
        flat_logprobs: Return log-probabilities as `FlatLogprobs`, for many positions.
        detokenize: Turn output tokens into text (a front end's matter; `stop` needs it).
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces between special tokens in the text.
        include_stop_str_in_output: Keep the stop string in the text.
        logit_bias: Token id -> value added to its logit.
        allowed_token_ids: Only these tokens may be drawn.
        bad_words: Words that the output may not hold.
        thinking_token_budget: Tokens that the model may think for; then the end of its thinking is written. -1: any.
        extra_args: For the engine's `logits_processors`.
        skip_reading_prefix_cache: Compute the whole prompt.
        structured_outputs: The form of the output: `StructuredOutputsParams`, or a dict of its fields.
        guided_decoding: The same by its older name.
        truncate_prompt_tokens: Keep the last this many prompt tokens; -1 keeps what the model's length allows.
        repetition_detection: End an output that repeats itself: `RepetitionDetectionParams`, or a dict of its fields.
        output_kind: Results are given when they are finished; a serving engine's other kinds are taken for that.
        stream_interval: Nothing is streamed; taken and not used.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = field(default_factory=list)
    stop_token_ids: Sequence[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = field(default_factory=list)
    thinking_token_budget: int | None = None
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    skip_reading_prefix_cache: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: StructuredOutputsParams | None = None
    truncate_prompt_tokens: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    stream_interval: int | None = None

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                _set(self, name, 1)
        for name in _EXACT:
            _set(self, name, read_integer(name, getattr(self, name), optional=name in _OPTIONAL_INTEGERS))
        for name in _COUNTS:
            _set(self, name, read_count(name, getattr(self, name), optional=name in _OPTIONAL_INTEGERS))
        for name, (low, high) in _RANGES.items():
            _set(self, name, read_number(name, getattr(self, name), low, high))
        for name in _FLAGS:
            _set(self, name, read_flag(name, getattr(self, name)))
        for name, most in _MOST_STRINGS.items():
            strings = read_strings(name, getattr(self, name), most=most, most_characters=_MOST_CHARACTERS)
            _set(self, name, list(strings))
        for name in ("thinking_token_budget", "seed"):
            if getattr(self, name) == -1:
                _set(self, name, None)
        _set(self, "extra_args", {} if self.extra_args is None else self.extra_args)
        stop_token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        _set(self, "stop_token_ids", list(dict.fromkeys(read_token_ids("stop_token_ids", stop_token_ids))))
        for name in _OPTIONAL_TOKEN_IDS:
            if getattr(self, name) is not None:
                _set(self, name, read_token_ids(name, getattr(self, name)))
        if self.prompt_logprob_token_ids is not None:
            _set(self, "prompt_logprob_token_ids", read_ids_or_rows(self.prompt_logprob_token_ids))
        if self.logit_bias is not None:
            _set(self, "logit_bias", read_bias(self.logit_bias))
        self._read_structured_outputs()
        self._read_serving_fields()
        if self.repetition_detection is not None:
            repetition = RepetitionDetectionParams.from_value(self.repetition_detection)
            _set(self, "repetition_detection", repetition if repetition.max_pattern_size else None)
        if self.top_k == -1:
            _set(self, "top_k", 0)
        self._check()

    def _check(self) -> None:
        _require(self.n >= 1, "n", self.n, "ask for at least one output")
        remedy = f"an engine holds at most {MOST_OUTPUTS:,} outputs of one prompt: give the prompt several times"
        _require(self.n <= MOST_OUTPUTS, "n", self.n, remedy)
        _require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "give a number of 64 bits")
        num_stops = len(self.stop_token_ids)
        remedy = f"it names {num_stops:,} tokens: name at most {MOST_STOP_TOKEN_IDS:,}"
        _require(num_stops <= MOST_STOP_TOKEN_IDS, "stop_token_ids", self.stop_token_ids, remedy)
        remedy = "n must be 1 when using greedy sampling (temperature=0), which would give one output n times"
        _require(self.n == 1 or not self.greedy, "n", self.n, f"{remedy}; ask for 1, or set a temperature")
        _require(self.top_k >= 0, "top_k", self.top_k, "use 0 (or -1) to keep all tokens, or a positive count")
        _require(self.top_p > 0, "top_p", self.top_p, "use a value in (0, 1]; 1 keeps all tokens")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "use a value above 0")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "ask for at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "use 0 or more")
        if self.max_tokens is not None:
            remedy = f"it may not exceed max_tokens={self.max_tokens}"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, remedy)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(count is None or count >= -1, name, count, "use None, -1 for all, or a count from 0 on")
        named = self.logprob_token_ids
        remedy = f"name 1 to {MOST_LOGPROB_TOKEN_IDS} tokens; logprobs=-1 returns all"
        _require(named is None or 0 < len(named) <= MOST_LOGPROB_TOKEN_IDS, "logprob_token_ids", named, remedy)
        start = self.prompt_logprob_start
        _require(start is None or start >= 0, "prompt_logprob_start", start, "use 0 or more")
        if start is not None:
            remedy = "it says where prompt_logprob_token_ids begins: give these too"
            _require(self.prompt_logprob_token_ids is not None, "prompt_logprob_start", start, remedy)
        _require(isinstance(self.extra_args, Mapping), "extra_args", self.extra_args, "give a dict")
        budget = self.thinking_token_budget
        _require(budget is None or budget >= 0, "thinking_token_budget", budget, "use -1 for any, or 0 or more")
        keep = self.truncate_prompt_tokens
        _require(keep is None or keep == -1 or keep >= 1, "truncate_prompt_tokens", keep, "use -1, or 1 or more")
        if self.stop:
            _require(self.detokenize, "detokenize", self.detokenize, "stop strings need detokenize=True")
        allowed = self.allowed_token_ids
        _require(allowed is None or len(allowed) > 0, "allowed_token_ids", allowed, "name at least one token")

    def _read_structured_outputs(self) -> None:
        given = self.structured_outputs
        if self.guided_decoding is not None:
            remedy = "it is the older name of structured_outputs: give one of them"
            _require(given is None, "guided_decoding", self.guided_decoding, remedy)
            given = self.guided_decoding
        if given is not None:
            _set(self, "structured_outputs", StructuredOutputsParams.from_value(given))
            _set(self, "guided_decoding", None)

    def _read_serving_fields(self) -> None:
        """Check what makes a difference to a stream only; kept as the defaults, so that the noise is the same."""
        kinds = [kind.name for kind in RequestOutputKind]
        given = self.output_kind
        is_kind = (
            isinstance(given, (int, str)) and not isinstance(given, bool) and given in (*kinds, *range(len(kinds)))
        )
        _require(is_kind, "output_kind", self.output_kind, f"choose one of {', '.join(kinds)}")
        interval = self.stream_interval
        _require(interval is None or interval >= 1, "stream_interval", interval, "give 1 or more")
        _set(self, "output_kind", RequestOutputKind.FINAL_ONLY)
        _set(self, "stream_interval", None)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_optional(cls, **params: Any) -> SamplingParams:
        """Build from values of which None stands for the default, as vLLM's method of this name does."""
        return cls.from_mapping(params)

    def clone(self) -> SamplingParams:
        """A copy of its own."""
        return replace(self)

    @classmethod
    def from_mapping(
        cls, params: Mapping[str, Any] | SamplingParams | None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Build from a row's `sampling_params`, its absent values taken from `defaults`.

        Args:
            params: A mapping of field names to values (None values count as absent), or a ready object.
            defaults: The model's generation_config, already in these field names.

        Raises:
            ValueError: for an unknown field or a bad value.
        """
        if isinstance(params, SamplingParams):
            return replace(params)
        if params is not None and not isinstance(params, Mapping):
            raise ValueError(
                f"sampling_params={shown(params)} is a {type(params).__name__}; "
                'give a dict such as {"temperature": 0.7, "max_tokens": 64}, or a SamplingParams'
            )
        given = {name: value for name, value in (params or {}).items() if value is not None}
        unknown = sorted(str(name) for name in given if name not in _FIELD_NAMES and name not in _REFUSED)
        if unknown:
            hint = nearest(unknown[0], _FIELD_NAMES)
            raise ValueError(f"sampling_params has unknown field(s) {', '.join(unknown[:8])[:400]}: {hint}")
        if "max_tokens" in (params or {}) and "max_tokens" not in given:
            given["max_tokens"] = None  # here None has a meaning of its own: up to the model's length
        return cls(**{**(defaults or {}), **given})

    def to_mapping(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as plain JSON values (`from_mapping` undoes it)."""
        values = {f.name: (getattr(self, f.name), _default(f)) for f in fields(self)}
        values["extra_args"] = (dict(self.extra_args), {})
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return {name: _plain(value) for name, value in changed.items()}


def _default(of: Field[Any]) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


_FIELD_NAMES = {field.name for field in fields(SamplingParams)}
# What to say where one of them is given beside the parameters.
SAMPLING_REMEDIES = {
    name: f"it is a sampling parameter: give sampling_params={{{name!r}: ...}}" for name in _FIELD_NAMES
}
_OPTIONAL_INTEGERS = (
    "stream_interval",
    "seed",
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
    "prompt_logprob_start",
    "thinking_token_budget",
    "truncate_prompt_tokens",
)
# A seed's value counts, and n is what is given back.
_EXACT = ("n", "seed")
_COUNTS = ("top_k", "min_tokens", *(name for name in _OPTIONAL_INTEGERS if name != "seed"))
# Outputs of one prompt at most, as vLLM's default.
MOST_OUTPUTS = 16384
# Each costs every step of its row.
MOST_STOP_TOKEN_IDS = 1024
_MOST_STRINGS = {"stop": 1024, "bad_words": 8192}
# They are tokenised, or searched for, in the engine's thread: about 0.1 s for as many.
_MOST_CHARACTERS = 1 << 16
_OPTIONAL_TOKEN_IDS = ("allowed_token_ids", "logprob_token_ids")
MOST_LOGPROB_TOKEN_IDS = 128
_FLAGS = (
    "ignore_eos",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_reading_prefix_cache",
)
_RANGES = {
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, math.inf),
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
}


def _plain(value: object) -> object:
    if isinstance(value, StructuredOutputsParams):
        return value.to_mapping()
    if isinstance(value, RepetitionDetectionParams):
        return asdict(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise invalid(name, value, remedy)


def _set(params: SamplingParams, name: str, value: object) -> None:
    object.__setattr__(params, name, value)
