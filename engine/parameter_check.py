"""Comparing what weight files hold with the parameters that a config asks for.

Owns which tensors a checkpoint must, may and must not have. Knows no file format and no torch.
Invariant: weights that pass are loaded without another complaint about names, shapes or dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from raydata_llm.engine.safetensors_file import TensorEntry

# Of a safetensors header; the value is what the engine would call the dtype.
FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}


class Parameters(Protocol):
    """What has parameters: a model's config."""

    @property
    def architecture(self) -> str:
        """Its class name in transformers."""
        ...

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the language model's head is no parameter of its own."""
        ...

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """All of them."""
        ...


class DrawnParameters(Parameters, Protocol):
    """Parameters that dummy weights can be drawn for."""

    @property
    def initializer_range(self) -> float:
        """Their standard deviation."""
        ...


def is_harmless_extra(name: str, model_config: Parameters) -> bool:
    """Whether a tensor that is no parameter may lie in a checkpoint: old RoPE buffers, the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model_config.tie_word_embeddings)


def check_parameters(path: Path, entries: Mapping[str, TensorEntry], model_config: Parameters) -> None:
    """Compare the tensors of weight files with the config's parameters.

    Raises:
        ValueError: for missing, unknown or wrongly shaped tensors, and for quantised or integer ones.
    """
    shapes = model_config.parameter_shapes()
    missing = [name for name in shapes if name not in entries]
    unknown = [name for name in entries if name not in shapes and not is_harmless_extra(name, model_config)]
    wrong = [
        f"{name} is {list(entries[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in entries and entries[name].shape != shape
    ]
    known = {name: entry.dtype for name, entry in entries.items() if name in shapes}
    typed = [f"{name} is {dtype}" for name, dtype in known.items() if dtype not in FLOAT_DTYPES]
    problems = (
        _list_some("missing", missing),
        _list_some("unknown", unknown),
        _list_some("of another shape", wrong),
        _list_some("of a dtype that is not run (use F32, BF16 or F16)", typed),
    )
    if any(problems):
        raise ValueError(
            f"the weights of model={str(path)!r} do not fit its config ({model_config.architecture}): "
            + "; ".join(problem for problem in problems if problem)
            + ". Give the folder of one complete model, or correct the config with hf_overrides"
        )


def _list_some(title: str, names: list[str], most: int = 3) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title}: {', '.join(names[:most])}{rest}"
