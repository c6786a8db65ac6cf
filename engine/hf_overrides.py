"""`hf_overrides` as a function of the model's config, as vLLM takes it: turned into the values that it changes.

Owns what the function sees: the config.json's values as attributes, with transformers' own defaults behind them. It is
called once, where the config is read first; from there on the overrides are plain values, which are sent to other
processes, compared by jobs that are run again, and shown in reports.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any


class ConfigView:
    """A config.json with attributes, for a function that changes some of them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(copy.deepcopy(dict(values)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        # Imported here: it takes seconds, and most functions read and write what the file has.
        from transformers import AutoConfig

        values = self.to_dict()
        config = AutoConfig.for_model(values.pop("model_type", ""), **values)
        return getattr(config, name)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several values."""
        self.__dict__.update(values)

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the file, or the default."""
        return self.__dict__.get(name, default)

    def get_text_config(self, *_: Any, **__: Any) -> ConfigView:
        """Itself: the models that are run here are models of text."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The values as they are now."""
        return copy.deepcopy(self.__dict__)


def changed_values(function: Callable[[Any], Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a function makes of a config: the values that are new, and None for those that it deletes.

    Args:
        function: Changes the config that it is given, and returns it or another one.

    Raises:
        ValueError: when it raises, or returns no config.
    """
    name = getattr(function, "__qualname__", repr(function))
    view = ConfigView(config)
    try:
        made = function(view)
    except Exception as error:
        raise ValueError(f"hf_overrides={name} raised {type(error).__name__}: {error}") from error
    made = view if made is None else made
    if not hasattr(made, "to_dict") and not isinstance(made, Mapping):
        raise ValueError(f"hf_overrides={name} returned a {type(made).__name__}: return the config that it was given")
    values = dict(made) if isinstance(made, Mapping) else made.to_dict()
    changed = {key: value for key, value in values.items() if key not in config or config[key] != value}
    return changed | {key: None for key in config if key not in values}
