"""How hidden states become a result: pooling parameters with vLLM's names and meanings.

Knows no tensors (importing it must not import torch).
Invariant: a PoolingParams is valid on its own; what depends on the model is checked by its engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from raydata_llm.engine.known_names import named_fields, nearest
from raydata_llm.engine.param_values import LARGEST_COUNT, invalid, read_flag, read_token_ids, shown, whole_number

PoolingTask = Literal["embed", "classify", "score", "token_embed", "token_classify"]
POOLING_TASKS: tuple[PoolingTask, ...] = get_args(PoolingTask)
EMBED_TASKS: tuple[PoolingTask, ...] = ("embed", "token_embed")


# Of vLLM's fields.
_REFUSED = {
    "late_chunking_params": "ask for task='token_embed' with normalize=False, and take the means of its rows",
}
_PAIR_LIMITS = ("max_tokens_per_query", "max_tokens_per_doc")


@named_fields(_REFUSED)
@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """Parameters of one request of a pooling model.

    Args:
        truncate_prompt_tokens: Cut longer prompts to so many tokens; -1: to what the model takes.
        dimensions: Keep the first so many values of an embedding (matryoshka models only), before normalisation.
        normalize: Scale an embedding to length 1; None: yes.
        use_activation: Put softmax or sigmoid, as the model says, over class logits; None: yes. Of an embedding it
            is another name for `normalize`.
        softmax, activation: Older names for `use_activation`.
        step_tag_id: Of results for each token, those alone whose token is this (the end of a step, for reward models).
        returned_token_ids: Of each token's classes, these alone, before the activation.
        skip_reading_prefix_cache: Prompts are always computed whole; taken and not used.
        extra_kwargs: For scores of pairs: {"max_tokens_per_doc": 512} cuts the second text to so many tokens before the
            two are put together, "max_tokens_per_query" the first one.
        task: "embed", "classify", "score", "token_embed" or "token_classify"; None: what the method is for.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    step_tag_id: int | None = None
    returned_token_ids: Sequence[int] | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    task: PoolingTask | None = None

    def __post_init__(self) -> None:
        for name, least in (("truncate_prompt_tokens", -1), ("dimensions", 1), ("step_tag_id", 0)):
            object.__setattr__(self, name, _count(name, getattr(self, name), least))
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0 is not valid: use -1, or 1 or more")
        object.__setattr__(self, "returned_token_ids", returned_ids("returned_token_ids", self.returned_token_ids))
        object.__setattr__(self, "skip_reading_prefix_cache", None)
        object.__setattr__(self, "extra_kwargs", _pair_limits(self.extra_kwargs, self.task))
        for name in ("normalize", "use_activation", *_OLDER):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_flag(name, getattr(self, name)))
        for name in _OLDER:
            if getattr(self, name) is not None and self.use_activation is None:
                object.__setattr__(self, "use_activation", getattr(self, name))
        if self.task is not None:
            as_task(self.task, "task")

    @classmethod
    def from_mapping(cls, params: Mapping[str, Any] | PoolingParams | None) -> PoolingParams:
        """Build from a row's `pooling_params`; None values count as absent.

        Raises:
            ValueError: for an unknown field or a bad value.
        """
        if isinstance(params, PoolingParams):
            return params
        if params is not None and not isinstance(params, Mapping):
            kind = type(params).__name__
            raise ValueError(f'pooling_params={shown(params)} is a {kind}: give a dict such as {{"dimensions": 256}}')
        given = {name: value for name, value in (params or {}).items() if value is not None}
        unknown = sorted(str(name) for name in given if name not in _FIELD_NAMES and name not in _REFUSED)
        if unknown:
            hint = nearest(unknown[0], _FIELD_NAMES)
            raise ValueError(f"pooling_params has unknown field(s) {', '.join(unknown[:8])[:400]}: {hint}")
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """The fields that are set, as plain JSON values (`from_mapping` undoes it)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    @property
    def normalizes(self) -> bool:
        """Whether an embedding is scaled to length 1."""
        given = self.use_activation if self.normalize is None else self.normalize
        return given is None or given

    @property
    def activates(self) -> bool:
        """Whether class logits go through the model's activation."""
        return self.use_activation is None or self.use_activation


_FIELD_NAMES = {field.name for field in fields(PoolingParams)}
_OLDER = ("softmax", "activation")
# Of which there is a result for each token.
TOKEN_TASKS: tuple[PoolingTask, ...] = ("token_embed", "token_classify")


def as_task(name: Any, field: str = "pooling_task") -> PoolingTask:
    """A task's name, checked.

    Raises:
        ValueError: for any other.
    """
    if not isinstance(name, str) or name not in POOLING_TASKS:
        raise invalid(field, name, f"choose one of {', '.join(POOLING_TASKS)}")
    task: PoolingTask = name
    return task


def returned_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """A list of class numbers, checked; None and an empty one are all classes."""
    if value is None:
        return None
    return read_token_ids(name, value) or None


def _pair_limits(given: Any, task: str | None) -> dict[str, int] | None:
    """`extra_kwargs`, checked; None values and an empty dict count as absent."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"extra_kwargs={shown(given)} is a {type(given).__name__}: give a dict")
    limits = {name: _count(f"extra_kwargs[{name!r}]", value, 1) for name, value in (given or {}).items()}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    for name in limits:
        if name not in _PAIR_LIMITS:
            known = " and ".join(_PAIR_LIMITS)
            raise ValueError(f"extra_kwargs[{name!r}] is not known: {known} are; there are no plugins that read others")
        if task not in (None, "score"):
            raise ValueError(f"extra_kwargs[{name!r}] does not fit task={task!r}, which has no pairs: leave it out")
    return {name: limit for name, limit in limits.items() if limit is not None} or None


def _count(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    number = whole_number(value)
    if number is None or number < least:
        raise invalid(name, value, f"give a whole number from {least} on, or None")
    return min(number, LARGEST_COUNT)
