"""How a pooling model pools, where the user says it and not the model's files.

Owns names (vLLM's), types and ranges. Knows no model and no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from raydata_llm.engine.pooling_params import PoolingParams, PoolingTask

PoolingType = Literal["cls", "last", "mean"]
_POOLING_TYPES: dict[str, PoolingType] = {"cls": "cls", "last": "last", "mean": "mean"}
_TOKEN_TYPES = ("all", "step")


@dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """Settings of a pooler; None leaves each to the model.

    Args:
        pooling_type: "CLS", "LAST" or "MEAN"; also what `tok_pooling_type` may be.
        seq_pooling_type: "CLS", "LAST" or "MEAN".
        tok_pooling_type: Which tokens have a result, of tasks that give one a token: "ALL", or "STEP": ends of steps.
        step_tag_id: The token that ends a step, where a request does not say.
        returned_token_ids: Which classes are returned, where a request does not say.
        normalize: Whether embeddings have length 1 where a request does not say.
        use_activation: Another name for it; of classes, whether they go through the activation.
        task: What `LLM.encode` does where it is not told.
        dimensions: As `PoolingParams` has it, where a request does not say.
        logit_mean, logit_sigma: Of classes: logits have the first taken off, and are divided by the second, before the
            activation.
        enable_chunked_processing: False: a prompt that is longer than the model takes is not embedded in parts.
        max_embed_len: Of prompts that are embedded in parts.
        enable_flash_late_interaction: Taken and not used: no model of late interaction is run.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    pooling_type: str | None = None
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    step_tag_id: int | None = None
    returned_token_ids: Sequence[int] | None = None
    task: PoolingTask | None = None
    dimensions: int | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None
    enable_chunked_processing: bool = False
    max_embed_len: int | None = None
    enable_flash_late_interaction: bool = True

    def __post_init__(self) -> None:
        kinds = {"pooling_type": (*_POOLING_TYPES, *_TOKEN_TYPES), "seq_pooling_type": tuple(_POOLING_TYPES)}
        for name, choices in {**kinds, "tok_pooling_type": _TOKEN_TYPES}.items():
            value = getattr(self, name)
            if value is not None and str(value).lower() not in choices:
                names = ", ".join(choices).upper()
                raise ValueError(f"pooler_config: {name}={value!r} is not valid: choose one of {names}")
        try:
            steps = PoolingParams(
                step_tag_id=self.step_tag_id,
                returned_token_ids=self.returned_token_ids,
                dimensions=self.dimensions,
                task=self.task,
            )
        except ValueError as error:
            raise ValueError(f"pooler_config: {error}") from error
        object.__setattr__(self, "returned_token_ids", steps.returned_token_ids)
        for name in ("step_tag_id", "returned_token_ids"):
            if getattr(self, name) is not None and not self.takes_steps:
                raise ValueError(f"pooler_config: {name}={getattr(self, name)!r} needs tok_pooling_type='STEP'")
        for name in ("normalize", "use_activation"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"pooler_config: {name}={getattr(self, name)!r} is not valid: give True or False")
        for name in ("logit_mean", "logit_sigma"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and (not is_number or (name == "logit_sigma" and not value)):
                remedy = "give a number" if name == "logit_mean" else "give a number other than 0"
                raise ValueError(f"pooler_config: {name}={value!r} is not valid: {remedy}")
        for name in ("enable_chunked_processing", "max_embed_len"):
            if getattr(self, name):
                raise ValueError(
                    f"pooler_config: {name}={getattr(self, name)!r} is not supported: set truncate_prompt_tokens="
                    "-1, or embed the parts of long texts and take their mean"
                )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any] | PoolerConfig | None) -> PoolerConfig:
        """Build from a user's `pooler_config`.

        Raises:
            ValueError: for an unknown name or a bad value.
        """
        if isinstance(given, PoolerConfig):
            return given
        if given is not None and not isinstance(given, Mapping):
            kind = type(given).__name__
            raise ValueError(
                f"pooler_config is a {kind}, which is not valid: give a dict such as {{'pooling_type': 'MEAN'}}"
            )
        known = [field.name for field in fields(cls)]
        for name in given or {}:
            if name not in known:
                raise ValueError(f"pooler_config[{name!r}] is not a setting here: known are {', '.join(known)}")
        return cls(**(given or {}))

    @property
    def kind(self) -> PoolingType | None:
        """Which hidden state stands for the prompt."""
        name = self.seq_pooling_type or self.pooling_type
        return None if name is None else _POOLING_TYPES.get(name.lower())

    @property
    def takes_steps(self) -> bool:
        """Whether of results for each token those at the ends of steps are wanted."""
        return "step" in (str(self.tok_pooling_type).lower(), str(self.pooling_type).lower())

    @property
    def normalizes(self) -> bool | None:
        """Whether embeddings have length 1 where a request does not say; None leaves it to the model."""
        return self.use_activation if self.normalize is None else self.normalize
