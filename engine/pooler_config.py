"""How a pooling model pools, where the user says it and not the model's files.

Owns names (vLLM's), types and ranges. Knows no model and no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

PoolingType = Literal["cls", "last", "mean"]
_POOLING_TYPES: dict[str, PoolingType] = {"cls": "cls", "last": "last", "mean": "mean"}


@dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """Settings of a pooler; None leaves each to the model.

    Args:
        pooling_type: "CLS", "LAST" or "MEAN".
        seq_pooling_type: Another name for it.
        tok_pooling_type: "ALL".
        normalize: Whether embeddings have length 1 where a request does not say.
        use_activation: Another name for it.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    pooling_type: str | None = None
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None
    normalize: bool | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        for name in ("pooling_type", "seq_pooling_type"):
            value = getattr(self, name)
            if value is not None and str(value).lower() not in _POOLING_TYPES:
                raise ValueError(f"pooler_config: {name}={value!r} is not valid: choose CLS, LAST or MEAN")
        if self.tok_pooling_type is not None and str(self.tok_pooling_type).upper() != "ALL":
            raise ValueError(f"pooler_config: tok_pooling_type={self.tok_pooling_type!r} is not valid: choose ALL")
        for name in ("normalize", "use_activation"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"pooler_config: {name}={getattr(self, name)!r} is not valid: give True or False")

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
        return None if name is None else _POOLING_TYPES[name.lower()]

    @property
    def normalizes(self) -> bool:
        """Whether embeddings have length 1 where a request does not say."""
        given = self.use_activation if self.normalize is None else self.normalize
        return given is None or given
