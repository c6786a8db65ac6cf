"""`hf_overrides` as a function: it sees the config, and what it changes is what the model is made of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.hf_overrides import changed_values
from raydata_llm.engine.model_files import ModelFiles, settle_overrides

CONFIG = {"model_type": "llama", "hidden_size": 96, "rope_parameters": {"rope_theta": 1e4}, "old": 1}


def in_place(config: Any) -> None:
    config.hidden_size *= 2
    config.rope_parameters["rope_theta"] = 5e5
    del config.old


def by_update(config: Any) -> Any:
    config.update({"hidden_size": config.get("hidden_size") * 2, "rope_parameters": {"rope_theta": 5e5}})
    del config.get_text_config().old
    return config


def a_new_one(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    values.pop("old")
    return {**values, "hidden_size": 192, "rope_parameters": {"rope_theta": 5e5}}


@pytest.mark.parametrize("function", [in_place, by_update, a_new_one])
def test_what_a_function_changes_becomes_values(function: Callable[[Any], Any]) -> None:
    assert changed_values(function, CONFIG) == {"hidden_size": 192, "rope_parameters": {"rope_theta": 5e5}, "old": None}
    assert CONFIG["rope_parameters"] == {"rope_theta": 1e4}


def test_a_function_sees_transformers_defaults_behind_the_files_values() -> None:
    def double(config: Any) -> Any:
        assert not hasattr(config, "no_such_setting") and config.num_attention_heads == 32
        config.num_attention_heads *= 2
        return config

    assert changed_values(double, {"model_type": "llama"}) == {"num_attention_heads": 64}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda config: 1 / 0, "hf_overrides=.*raised ZeroDivisionError: division by zero"),
        (lambda config: 3, "returned a int: return the config that it was given"),
    ],
)
def test_a_function_that_does_not_work_is_one_error(function: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed_values(function, CONFIG)


def fewer_layers(config: Any) -> Any:
    config.num_hidden_layers = 2
    return config


def test_the_engine_takes_what_the_function_says(tiny_model: Callable[..., Path]) -> None:
    path = str(tiny_model("llama"))
    config = EngineConfig(model=path, device="cpu", load_format="dummy", hf_overrides=fewer_layers)
    engine = Engine(config)
    assert engine.model_config.num_layers == 2 and engine.config.hf_overrides == {"num_hidden_layers": 2}
    engine.shutdown()
    assert settle_overrides(path, fewer_layers) == {"num_hidden_layers": 2}
    assert ModelFiles.open(path, load_format="dummy", hf_overrides=fewer_layers).hf_config["num_hidden_layers"] == 2


def test_a_function_that_reads_what_the_file_has_imports_no_torch() -> None:
    code = (
        "import sys\nfrom raydata_llm.engine.hf_overrides import changed_values\n"
        "changed_values(lambda config: config.update({'a': config.b}), {'b': 1})\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_overrides_are_a_dict_or_a_function() -> None:
    with pytest.raises(ValueError, match="hf_overrides is a list, which is not valid: give a dict, or a function"):
        EngineConfig(model="m", hf_overrides=[1])  # type: ignore[arg-type]
