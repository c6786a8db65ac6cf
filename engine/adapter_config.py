"""An adapter_config.json of PEFT: the numbers that a LoRA adapter's tensors are to be taken with.

Owns which of PEFT's settings are computed here, which change nothing once the adapter is trained, and the refusal of
all others: a setting that nobody looked at would give wrong answers in silence. Knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raydata_llm.engine.regular_file import read_json, shown

_Number = TypeVar("_Number", int, float)
# What a user can do where an adapter is not run as it is.
MERGE = "merge it into its model (PEFT's merge_and_unload) and give that model"
# Of these the tensors themselves say all there is to know, or they were of use in training only.
_OF_TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "velora_config"),
    # PEFT itself turns it off for the linears of these models.
    "fan_in_fan_out",
}
_COMPUTED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "init_lora_weights"),
}
_BIASES = ("none", "all", "lora_only")
# Other ways to begin take a part out of the model's weights first.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
# PEFT's own, where a file leaves them out.
_RANK, _ALPHA = 8, 8
# Far above those in use.
_MOST_RANK, _MOST_ALPHA = 1 << 20, 1e9


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What of the settings bears on the answer.

    Args:
        rank, alpha: Of modules that no pattern names.
        rank_pattern, alpha_pattern: Others, by a regular expression for the end of a module's name.
        use_rslora: Scale by the rank's square root.
        use_dora: Each adapted module has a magnitude.
        modules_to_save: Names that the whole weights among the tensors end with.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    modules_to_save: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read a folder's adapter_config.json.

        Raises:
            ValueError: naming the adapter, the field, its value and the remedy.
        """
        path = folder / "adapter_config.json"
        try:
            settings = read_json(path)
        except ValueError as error:
            raise ValueError(f"lora_path={str(folder)!r} is no adapter: {path.name}: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"lora_path={str(folder)!r} is no adapter: {path.name} holds a {type(settings).__name__}")
        _refuse_unsupported(folder, settings)
        modules = settings.get("modules_to_save") or []
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise _bad(folder, "modules_to_save", modules, "give a list of names")
        return cls(
            rank=_rank(folder, "r", settings.get("r", _RANK)),
            alpha=_alpha(folder, "lora_alpha", settings.get("lora_alpha", _ALPHA)),
            rank_pattern={key: _rank(folder, key, rank) for key, rank in _pattern(folder, settings, "rank_pattern")},
            alpha_pattern={key: _alpha(folder, key, one) for key, one in _pattern(folder, settings, "alpha_pattern")},
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            modules_to_save=tuple(modules),
        )

    def rank_of(self, module: str) -> int:
        """A module's rank; its name is that of the model's own."""
        return _of_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(module)
        return _of_pattern(self.alpha_pattern, module, self.alpha) / (rank**0.5 if self.use_rslora else rank)


def _of_pattern(pattern: Mapping[str, _Number], module: str, otherwise: _Number) -> _Number:
    # As PEFT matches: the first key that is the end of the name.
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _refuse_unsupported(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") not in ("LORA", None):
        raise _bad(folder, "peft_type", settings["peft_type"], f"adapters of LoRA alone are run: {MERGE}")
    if settings.get("bias") not in (*_BIASES, None):
        raise _bad(folder, "bias", settings["bias"], f"it is one of {', '.join(_BIASES)}")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INITS:
        remedy = "save it with path_initial_model_for_weight_conversion, or"
        raise _bad(folder, "init_lora_weights", init, f"it is of a model with other weights: {remedy} {MERGE}")
    for name, value in settings.items():
        # Of the many that PEFT writes, those that are off ask for nothing.
        if name not in _OF_TRAINING | _COMPUTED and value not in (None, False, [], {}, ""):
            raise _bad(folder, name, value, f"it is not supported: {MERGE}")
    if settings.get("use_dora") and settings.get("lora_bias"):
        raise _bad(folder, "lora_bias", True, f"it does not go with use_dora=True: {MERGE}")


def _pattern(folder: Path, settings: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = settings.get(name) or {}
    if not isinstance(pattern, dict):
        raise _bad(folder, name, pattern, "give a mapping of names to numbers")
    for key in pattern:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise _bad(folder, name, key, f"it is no regular expression ({error})") from error
    return list(pattern.items())


def _rank(folder: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_RANK:
        raise _bad(folder, name, value, f"a rank is a number from 1 to {_MOST_RANK}")
    return value


def _alpha(folder: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _MOST_ALPHA:
        raise _bad(folder, name, value, f"give a number of {_MOST_ALPHA:g} at most")
    return float(value)


def _bad(folder: Path, name: str, value: Any, problem: str) -> ValueError:
    return ValueError(f"the adapter {str(folder)!r} has {name}={shown(value)}: {problem}")
