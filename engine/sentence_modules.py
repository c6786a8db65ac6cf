"""Reads what sentence-transformers' files (modules.json and its folders) say a model does with its hidden states.

Owns the pooling, the layers after it and whether the embedding is normalised. Knows no tensors: `pooler.py` runs the
layers. Invariant: what is read is run as sentence-transformers runs it; any other module is refused with a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from raydata_llm.engine.pooler_config import PoolingType
from raydata_llm.engine.regular_file import check_regular, read_json, shown

LayerKind = Literal["dense", "layer_norm", "normalize"]
LayerActivation = Literal["identity", "tanh", "relu", "gelu", "silu", "sigmoid"]

_MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_POOLING_MODES: dict[str, PoolingType] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
# The older spelling has a switch for each mode.
_POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_ACTIVATIONS: dict[str, LayerActivation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
_EMBEDDING = "sentence_embedding"


@dataclass(frozen=True, kw_only=True)
class SentenceLayer:
    """A module that is applied to the pooled state.

    Args:
        kind: "dense": activation(W x + b), plus x or a projection of it where `residual`; "layer_norm"; "normalize":
            to length 1.
        folder: Where its weights are, below the model's folder.
        in_features: Size of its input; 0 of "normalize", which takes any.
        out_features: Size of its output.
        bias: Whether a dense layer has one.
        activation: Of a dense layer.
        residual: Whether a dense layer adds its input to its output.
    """

    kind: LayerKind
    folder: str
    in_features: int = 0
    out_features: int = 0
    bias: bool = True
    activation: LayerActivation = "identity"
    residual: bool = False

    @property
    def architecture(self) -> str:
        """Its name in messages."""
        return f"sentence-transformers' {self.kind} in {self.folder}"

    @property
    def tie_word_embeddings(self) -> bool:
        """There is no language model's head here."""
        return False

    @property
    def initializer_range(self) -> float:
        """Standard deviation of dummy weights."""
        return 0.02

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of its own weight file."""
        if self.kind == "normalize":
            return {}
        if self.kind == "layer_norm":
            return {"norm.weight": (self.in_features,), "norm.bias": (self.in_features,)}
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes["linear.bias"] = (self.out_features,)
        if self.residual and self.in_features != self.out_features:
            shapes["residual.weight"] = (self.out_features, self.in_features)
        return shapes


@dataclass(frozen=True, kw_only=True)
class SentenceModules:
    """A model's modules.

    Args:
        pooling: Which hidden state stands for the prompt; None where no Pooling module says.
        layers: What is applied to the pooled state, in order; a last Normalize is `normalizes` and not among them.
        normalizes: Whether the embedding has length 1 where nobody says otherwise.
    """

    pooling: PoolingType | None
    layers: tuple[SentenceLayer, ...]
    normalizes: bool

    @classmethod
    def read(cls, folder: Path, *, pooling: PoolingType | None = None) -> SentenceModules | None:
        """Read a model's modules.json; None of a model without one.

        Args:
            folder: The model's.
            pooling: What the user asks for; the model's own word on it is then not read.

        Raises:
            ValueError: for a module or a setting that is not run, naming the file.
        """
        path = folder / "modules.json"
        if not lexists(path):
            return None
        layers: list[SentenceLayer] = []
        for module in _read_modules(path):
            kind = str(module.get("type")).rpartition(".")[2]
            if kind not in _MODULES:
                raise ValueError(
                    f"{path} has a {kind}: only models of {', '.join(_MODULES)} are run; choose another model"
                )
            place = _place(path, module.get("path"))
            if kind == "Pooling":
                pooling = pooling or _pooling(folder, place)
            elif kind not in ("Transformer", "Dropout"):  # dropout does nothing when a model is run
                layers.append(_layer(folder, place, kind))
        normalizes = bool(layers) and layers[-1].kind == "normalize"
        return cls(pooling=pooling, layers=tuple(layers[: len(layers) - normalizes]), normalizes=normalizes)

    def embedding_size(self, hidden_size: int) -> int:
        """Values of an embedding.

        Args:
            hidden_size: Values of the pooled state.

        Raises:
            ValueError: for layers that do not fit it or one another.
        """
        size = hidden_size
        for layer in self.layers:
            if layer.kind == "normalize":
                continue
            if layer.in_features != size:
                raise ValueError(
                    f"{layer.folder}/config.json of the model: its input has {layer.in_features} values, but what "
                    f"comes before it gives {size}: give the model's own files"
                )
            size = layer.out_features
        return size


def layer_weight_file(folder: Path, layer: SentenceLayer, load_format: str) -> Path:
    """The file that holds a layer's weights.

    Args:
        folder: The model's.
        layer: One with parameters.
        load_format: `EngineConfig`'s: "pt" takes torch's file alone, "safetensors" the other alone.

    Raises:
        ValueError: when there is none.
    """
    names = {"pt": ["pytorch_model.bin"], "safetensors": ["model.safetensors"]}
    for name in names.get(load_format, ["model.safetensors", "pytorch_model.bin"]):
        if lexists(folder / layer.folder / name):
            check_regular(folder / layer.folder / name)
            return folder / layer.folder / name
    raise ValueError(
        f"{folder / layer.folder} has no model.safetensors or pytorch_model.bin, which modules.json needs for its "
        f"{layer.kind} layer: copy the model's folder with its sub-folders"
    )


def _read_modules(path: Path) -> list[Mapping[str, Any]]:
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, Mapping) for module in modules):
        raise ValueError(f"{path} is not a list of modules: download it again")
    return modules


def _read_settings(path: Path) -> Mapping[str, Any]:
    settings = read_json(path) if lexists(path) else {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return settings


def _place(modules: Path, given: Any) -> str:
    """A module's folder, below the model's."""
    place = "" if given is None else given
    parts = PurePosixPath(place).parts if isinstance(place, str) else ("..",)
    if not isinstance(place, str) or place.startswith("/") or ".." in parts or "\\" in place or "\0" in place:
        raise ValueError(
            f"{modules} has path={shown(given)}, which is not a folder below the model's: download it again"
        )
    return place


def _pooling(folder: Path, place: str) -> PoolingType | None:
    path = folder / place / "config.json"
    if not lexists(path):
        return None
    settings = _read_settings(path)
    given = settings.get("pooling_mode")
    modes = [given] if isinstance(given, str) else list(given) if isinstance(given, list) else []
    modes = modes or [mode for switch, mode in _POOLING_SWITCHES.items() if settings.get(switch)] or ["mean"]
    if len(modes) != 1 or modes[0] not in _POOLING_MODES:
        raise ValueError(
            f"{path} asks for pooling by {', '.join(map(str, modes))}: one of {', '.join(_POOLING_MODES)} is run; "
            "choose another model, or pool another way by pooler_config={'pooling_type': ...}"
        )
    return _POOLING_MODES[modes[0]]


def _layer(folder: Path, place: str, kind: str) -> SentenceLayer:
    path = folder / place / "config.json"
    settings = _read_settings(path)
    for name in ("module_input_name", "module_output_name"):
        if settings.get(name) not in (None, _EMBEDDING):
            raise ValueError(
                f"{path} has {name}={shown(settings[name])}: only modules that turn one {_EMBEDDING} "
                "into another are run; choose another model"
            )
    if kind == "Normalize":
        return SentenceLayer(kind="normalize", folder=place)
    if kind == "LayerNorm":
        size = _size(path, settings, "dimension")
        return SentenceLayer(kind="layer_norm", folder=place, in_features=size, out_features=size)
    return SentenceLayer(
        kind="dense",
        folder=place,
        in_features=_size(path, settings, "in_features"),
        out_features=_size(path, settings, "out_features"),
        bias=_switch(path, settings, "bias", True),
        activation=_activation(path, settings),
        residual=_switch(path, settings, "use_residual", False),
    )


def _size(path: Path, settings: Mapping[str, Any], name: str) -> int:
    size = settings.get(name)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 24:
        raise ValueError(f"{path} has {name}={shown(size)}: it must be a whole number from 1 on; download it again")
    return size


def _switch(path: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{path} has {name}={shown(value)}: it must be true or false; download it again")
    return value


def _activation(path: Path, settings: Mapping[str, Any]) -> LayerActivation:
    # Its constructor's default, which counts where the file says nothing.
    name = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = _ACTIVATIONS.get(name) if isinstance(name, str) else None
    if activation is None:
        raise ValueError(
            f"{path} has activation_function={shown(name)}: run are {', '.join(_ACTIVATIONS)}; choose another model"
        )
    return activation
