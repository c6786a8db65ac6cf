"""Where a model's files are and what they say, before any tensor is loaded.

Owns finding config, generation_config and weight files in a folder or a GGUF file, and checking the weights' headers
against the config. Knows no torch, so a driver runs it before any device is taken.
Invariant: an open ModelFiles names files that exist.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any, Literal

from raydata_llm.engine.config_fields import read_token_ids
from raydata_llm.engine.gguf_file import GgufFile
from raydata_llm.engine.hf_overrides import changed_values
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.parameter_check import FLOAT_DTYPES, Parameters, check_parameters
from raydata_llm.engine.regular_file import check_regular, inside, open_regular, read_json_object, shorten
from raydata_llm.engine.safetensors_file import TensorEntry, read_header

Overrides = Mapping[str, Any] | Callable[[Any], Any]

_PT_FORMATS = ("auto", "pt")
_SAFETENSORS_FORMATS = ("auto", "safetensors")


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    Args:
        path: The folder or the GGUF file.
        kind: Which of the two.
        hf_config: The config.json, or what a GGUF file's metadata say in its terms, with hf_overrides applied.
        generation_config: The raw generation_config.json; empty when there is none.
        weight_files: Empty for dummy weights.
    """

    path: Path
    kind: Literal["folder", "gguf"]
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    weight_files: tuple[Path, ...]

    @classmethod
    def open(cls, path: str, *, load_format: str = "auto", hf_overrides: Overrides | None = None) -> ModelFiles:
        """Find the files of a model.

        Args:
            path: A folder in Hugging Face's layout, or a .gguf file.
            load_format: EngineConfig's; "dummy" needs no weight files.
            hf_overrides: Values that replace those of the config, or a function that changes it.

        Raises:
            ValueError: when something is missing or cannot be read.
        """
        location = Path(path).expanduser()
        if location.is_file():
            return _open_gguf(location, load_format, hf_overrides or {})
        if not location.is_dir():
            raise ValueError(
                f"model={path!r} does not exist: give a folder with config.json and weights, or a .gguf file"
            )
        config = read_json_object(_config_path(location))
        generation_path = location / "generation_config.json"
        return cls(
            path=location,
            kind="folder",
            hf_config=override_config(config, hf_overrides or {}),
            generation_config=read_json_object(generation_path) if lexists(generation_path) else {},
            weight_files=() if load_format == "dummy" else _find_weights(location, load_format),
        )

    def model_config(self) -> ModelConfig:
        """The model's config.

        Raises:
            ValueError: for a model that the engine does not run.
        """
        return ModelConfig.from_hf(self.typed_config())

    def typed_config(self) -> dict[str, Any]:
        """The config.json; without a dtype of its own it takes that of the first weight."""
        config = dict(self.hf_config)
        first = next(iter(self.weight_files), None)
        if not (config.get("dtype") or config.get("torch_dtype")) and first and first.suffix == ".safetensors":
            dtypes = (FLOAT_DTYPES.get(entry.dtype) for entry in read_header(first).values())
            config["dtype"] = next((dtype for dtype in dtypes if dtype), None)
        return config

    def check_weights(self, model: Parameters, name_of: Callable[[str], str | None] = str) -> None:
        """Check that the weight files hold every parameter, in full and in the right shape.

        Only headers are read; of torch's pickled files only that they are whole.

        Args:
            model: What has the parameters.
            name_of: The parameter's name by the file's; None for what is not looked at.

        Raises:
            ValueError: naming the first few parameters that are missing, unknown or of another shape.
        """
        if not self.weight_files:
            return
        if self.kind == "gguf":
            check_parameters(self.path, _renamed(GgufFile.open(self.path).entries(), name_of), model)
            return
        if self.weight_files[0].suffix != ".safetensors":
            for file in self.weight_files:
                check_torch_file(file)
            return
        entries: dict[str, TensorEntry] = {}
        for file in self.weight_files:
            header = read_header(file)
            twice = [name for name in header if name in entries]
            if twice:
                raise ValueError(f"{twice[0]} of model={str(self.path)!r} is in two weight files: keep one of them")
            entries |= header
        check_parameters(self.path, _renamed(entries, name_of), model)

    def default_sampling_params(self, overrides: Mapping[str, Any], *, with_own: bool = True) -> dict[str, Any]:
        """The generation_config's values in SamplingParams' names; do_sample=False means greedy.

        Args:
            overrides: Values in its names that replace its own.
            with_own: Whether its own count at all.
        """
        merged = {**(self.generation_config if with_own else {}), **overrides}
        given = {name: merged.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        given["max_tokens"] = merged.get("max_new_tokens")
        if merged.get("do_sample") is False and "temperature" not in overrides:
            given["temperature"] = 0.0
        return {name: value for name, value in given.items() if value is not None}

    def eos_token_ids(self, model_config: ModelConfig) -> tuple[int, ...]:
        """End tokens of config and generation_config together."""
        extra = read_token_ids(self.generation_config, "eos_token_id")
        return tuple(dict.fromkeys(model_config.eos_token_ids + extra))


def _renamed(entries: Mapping[str, TensorEntry], name_of: Callable[[str], str | None]) -> dict[str, TensorEntry]:
    named = ((name_of(stored), entry) for stored, entry in entries.items())
    return {name: entry for name, entry in named if name is not None}


def override_config(config: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A config with a user's values in place of its own, or with what a user's function makes of it.

    The two styles of one setting (rope_scaling and rope_parameters, torch_dtype and dtype) replace each other, and new
    RoPE parameters keep the model's own theta unless they name one.
    """
    if not isinstance(overrides, Mapping):
        overrides = changed_values(overrides, config)
    base = dict(config)
    if isinstance(base.get("rope_parameters"), Mapping) and "rope_theta" in base["rope_parameters"] and overrides:
        # At the top level theta survives the replacement of the parameters around it.
        base["rope_parameters"] = dict(base["rope_parameters"])
        base["rope_theta"] = base["rope_parameters"].pop("rope_theta")
    for pair in (("rope_scaling", "rope_parameters"), ("torch_dtype", "dtype")):
        if any(name in overrides for name in pair):
            base = {name: value for name, value in base.items() if name not in pair}
    return {**base, **overrides}


def settle_overrides(path: str, overrides: Overrides) -> Mapping[str, Any]:
    """The values that a function changes in a model's config, for processes that it cannot be sent to.

    Raises:
        ValueError: when the function raises.
    """
    if isinstance(overrides, Mapping):
        return overrides
    return changed_values(overrides, ModelFiles.open(path, load_format="dummy").hf_config)


def _open_gguf(path: Path, load_format: str, hf_overrides: Overrides) -> ModelFiles:
    if path.suffix != ".gguf":
        raise ValueError(f"model={str(path)!r} is a file, but not a .gguf: give the folder of a model, or a .gguf file")
    if load_format not in ("auto", "gguf", "dummy"):
        raise ValueError(f"load_format={load_format!r} does not fit model={str(path)!r}: use 'auto' or 'gguf'")
    return ModelFiles(
        path=path,
        kind="gguf",
        hf_config=override_config(GgufFile.open(path).hf_config(), hf_overrides),
        generation_config={},
        weight_files=() if load_format == "dummy" else (path,),
    )


def _config_path(folder: Path) -> Path:
    path = folder / "config.json"
    if not lexists(path):
        gguf = sorted(folder.glob("*.gguf"))
        remedy = f"name the file itself: {str(gguf[0])!r}" if gguf else "give the folder of a Hugging Face model"
        raise ValueError(f"model={str(folder)!r} has no config.json: {remedy}")
    return path


def _find_weights(folder: Path, load_format: str) -> tuple[Path, ...]:
    if load_format == "gguf":
        raise ValueError(
            f"load_format='gguf' does not fit the folder model={str(folder)!r}: name the .gguf file itself"
        )
    if load_format in _SAFETENSORS_FORMATS:
        files = _weight_files(folder, "model.safetensors", "model*.safetensors")
        if files:
            return files
    if load_format in _PT_FORMATS:
        files = _weight_files(folder, "pytorch_model.bin", "pytorch_model*.bin")
        if files:
            return files
    either = "model*.safetensors or pytorch_model*.bin"
    wanted = {"pt": "pytorch_model*.bin", "safetensors": "model*.safetensors"}.get(load_format, either)
    raise ValueError(
        f"model={str(folder)!r} has no weights ({wanted}): "
        "give a complete folder, another load_format, or load_format='dummy' for random weights"
    )


def _weight_files(folder: Path, single: str, pattern: str) -> tuple[Path, ...]:
    """The one weight file, or the shards that the index names, or those that lie there without an index."""
    files = [folder / single] if lexists(folder / single) else []
    index_path = folder / f"{single}.index.json"
    if not files and lexists(index_path):
        files = _indexed_files(folder, index_path, Path(single).suffix)
    files = files or sorted(folder.glob(pattern))
    for file in files:
        check_regular(file)
    return tuple(files)


def _indexed_files(folder: Path, index_path: Path, suffix: str) -> list[Path]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{str(index_path)!r} has no weight_map: download it again")
    named = {inside(folder, shard, f"weight_map of {str(index_path)!r}") for shard in _distinct(weight_map)}
    shards = sorted(named)
    foreign = [str(shard.relative_to(folder)) for shard in shards if shard.suffix != suffix]
    if foreign:
        raise ValueError(f"{str(index_path)!r} names {shorten(foreign)}, no {suffix} files: download it again")
    missing = [str(shard.relative_to(folder)) for shard in shards if not lexists(shard)]
    if missing:
        raise ValueError(f"{str(index_path)!r} names files that are not there: {shorten(missing)}; download them")
    return shards


def _distinct(weight_map: dict[str, Any]) -> list[Any]:
    """The map's values once each, whatever they are."""
    names = {name for name in weight_map.values() if isinstance(name, str)}
    return [*names, *(name for name in weight_map.values() if not isinstance(name, str))]


def check_torch_file(path: Path) -> Literal["archive", "pickle"]:
    """Which of torch's formats a file has: an archive, or the bare pickle that torch wrote before 1.6.

    Raises:
        ValueError: when it is neither; an archive's directory is at its end, so one cut short is no archive.
    """
    with open_regular(path) as file:
        if file.read(2) == b"\x80\x02":
            return "pickle"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"weight file {str(path)!r} is damaged or not torch's: download it again")
    return "archive"
