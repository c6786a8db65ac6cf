"""A LoRA adapter's tensors, as PEFT writes them, by the module of the model that they change.

    W' = m / ||W + s B A|| (W + s B A)      DoRA's factor m / ||...||, a number an output, is 1 without it
    y  = W' x + b'

Owns the names of the adapter's tensors and what fits the model. Knows no slots and no device: an adapter is read to the
host once and copied to a slot when a row asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os.path import lexists
from pathlib import Path

import torch

from raydata_llm.engine.adapter_config import MERGE, AdapterConfig
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.regular_file import check_regular
from raydata_llm.engine.safetensors_file import read_header

# A fused linear's parts, in order.
FUSED_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_PREFIX = "base_model.model."
# How a tensor's name ends, and which it is then; longer endings before shorter ones.
_KINDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".modules_to_save.weight": "weight",
    ".modules_to_save.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}


@dataclass(frozen=True, kw_only=True)
class ModuleChange:
    """An adapter's tensors of one module, on the host; None for what it leaves alone.

    For the embedding "in" is the vocabulary and "out" the hidden size, though its weight is [in, out].

    Args:
        a: [R, in].
        b: [out, R], scaled.
        magnitude: [out] DoRA's.
        bias: [out] instead of the module's own.
        added_bias: [out] B's own, scaled.
        weight: Instead of the module's own, or the same as that: PEFT writes it beside an embedding's A and B.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    added_bias: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    @property
    def is_affine(self) -> bool:
        """Whether it keeps a linear's weight, and does more than add B A x."""
        if self.weight is not None:
            return False
        return self.magnitude is not None or self.bias is not None or self.added_bias is not None

    @property
    def num_bytes(self) -> int:
        """On the host."""
        return sum(tensor.nbytes for one in fields(self) if (tensor := getattr(self, one.name)) is not None)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter on the host.

    Args:
        changes: By the module's name in the model.
    """

    changes: Mapping[str, ModuleChange] = field(default_factory=dict)

    @property
    def is_affine(self) -> bool:
        """Whether a linear of a layer is scaled or has another bias."""
        return any(change.is_affine for name, change in self.changes.items() if name not in (EMBEDDING, HEAD))

    @property
    def num_bytes(self) -> int:
        """On the host."""
        return sum(change.num_bytes for change in self.changes.values())


def read_adapter(folder: Path, config: ModelConfig, *, max_rank: int) -> Adapter:
    """Read a folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        ValueError: for an adapter that is none, that asks for more than is computed here, or of another model.
    """
    settings = AdapterConfig.read(folder)
    found = _by_module(folder, _tensors(folder))
    shapes = config.parameter_shapes()
    shapes.setdefault(f"{HEAD}.weight", shapes[f"{EMBEDDING}.weight"])
    for saved in settings.modules_to_save:
        # Names of other models' modules, such as a classifier's, are in many files.
        is_of_model = any(name.endswith(f"{saved}.weight") for name in shapes)
        if is_of_model and not any(module.endswith(saved) for module in found):
            raise ValueError(
                f"the adapter {str(folder)!r} has modules_to_save with {saved!r}, but no such tensor: save it anew"
            )
    changes = {}
    for module, tensors in found.items():
        if not _is_known(module, shapes):
            raise ValueError(
                f"the adapter {str(folder)!r} changes {module} ({', '.join(sorted(tensors))}): only the linears and "
                f"norms of this model's {config.num_layers} layers, embed_tokens and lm_head are supported: {MERGE}"
            )
        rank = settings.rank_of(module)
        if rank > max_rank and "a" in tensors:
            raise ValueError(
                f"the adapter {str(folder)!r} has rank {rank} for {module}, above max_lora_rank={max_rank}: raise that"
            )
        _check_shapes(folder, module, tensors, rank, shapes)
        _check_complete(folder, module, tensors, rank, shapes, use_dora=settings.use_dora)
        changes[module] = _change(tensors, settings.scale_of(module))
    return Adapter(changes=changes)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((file for file in files if lexists(file)), None)
    if path is None:
        raise ValueError(f"lora_path={str(folder)!r} has neither adapter_model.safetensors nor adapter_model.bin")
    check_regular(path)
    try:
        return _read(path)
    except Exception as error:  # of either library's own kinds, and no more than one request is to fail of it
        cause = str(error).split("\n")[0]
        raise ValueError(f"the adapter {str(folder)!r} is damaged: {path.name} cannot be read: {cause}") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        # Its lengths are checked before memory is taken.
        read_header(path)
        return load_file(path)
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _by_module(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(_PREFIX).replace(".default", "")
        ending = next((ending for ending in _KINDS if plain.endswith(ending)), None)
        if not name.startswith(_PREFIX) or ending is None:
            raise ValueError(f"the adapter {str(folder)!r} has a tensor {name}, which is not supported: {MERGE}")
        if not tensor.is_floating_point():
            raise ValueError(f"the adapter {str(folder)!r} is damaged: {name} is {tensor.dtype}")
        module = found.setdefault(plain.removesuffix(ending), {})
        if _KINDS[ending] in module:
            raise ValueError(f"the adapter {str(folder)!r} is damaged: it has {name} twice, under two names")
        module[_KINDS[ending]] = tensor
    return found


def is_norm(module: str) -> bool:
    """Whether it is a norm of the hidden states."""
    return module.split(".")[-1] in _NORMS


def _is_known(module: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    linears = {part for parts in FUSED_PARTS.values() for part in parts}
    is_linear = module in (EMBEDDING, HEAD) or ".".join(module.split(".")[-2:]) in linears
    return f"{module}.weight" in shapes and (is_linear or is_norm(module))


def _check_shapes(
    folder: Path,
    module: str,
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    weight = shapes[f"{module}.weight"]
    if is_norm(module) and tensors.keys() != {"weight"}:
        kinds = ", ".join(sorted(tensors))
        raise ValueError(f"the adapter {str(folder)!r} has {kinds} for {module}, which is not supported: {MERGE}")
    outputs, inputs = reversed(weight) if module == EMBEDDING else (weight[0], weight[-1])
    wanted: dict[str, tuple[int, ...]] = {"a": (rank, inputs), "b": (outputs, rank), "weight": weight}
    for kind, tensor in tensors.items():
        fitting = wanted.get(kind, (outputs,))
        found = tuple(tensor.shape)
        if found == fitting or (kind == "magnitude" and found in ((outputs, 1), (1, outputs))):
            continue
        if kind in ("a", "b") and rank not in found:
            raise ValueError(f"the adapter {str(folder)!r} has no pair of rank {rank} for {module}: {kind} is {found}")
        if kind in ("weight", "a", "b") and module in (EMBEDDING, HEAD):
            raise ValueError(
                f"the adapter {str(folder)!r} has another vocabulary than its model: {kind} of {module} has shape "
                f"{found}, the model {weight}: {MERGE}"
            )
        raise ValueError(
            f"the adapter {str(folder)!r} is of another model: {kind} of {module} has shape {found}, not {fitting}"
        )


def _check_complete(
    folder: Path,
    module: str,
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    use_dora: bool,
) -> None:
    has_pair = "a" in tensors
    if has_pair != ("b" in tensors):
        raise ValueError(f"the adapter {str(folder)!r} has no pair of rank {rank} for {module}")
    if ("magnitude" in tensors) != (has_pair and use_dora):
        raise ValueError(
            f"the adapter {str(folder)!r} has use_dora={use_dora}, which {module} does not fit: save it anew"
        )
    if has_pair and "weight" in tensors and module not in (EMBEDDING, HEAD):
        raise ValueError(
            f"the adapter {str(folder)!r} has A, B and another weight for {module}, which is not supported: {MERGE}"
        )
    has_bias = f"{module}.bias" in shapes
    if ("bias" in tensors and not has_bias) or ("b_bias" in tensors and module in (EMBEDDING, HEAD)):
        raise ValueError(f"the adapter {str(folder)!r} has a bias for {module}, which is not supported: {MERGE}")


def _change(tensors: Mapping[str, torch.Tensor], scale: float) -> ModuleChange:
    # Copies: a file that is written anew under a mapped tensor ends the process.
    numbers = {kind: tensor.float() for kind, tensor in tensors.items() if kind != "weight"}
    b, b_bias, magnitude = numbers.get("b"), numbers.get("b_bias"), numbers.get("magnitude")
    weight, a, bias = tensors.get("weight"), numbers.get("a"), numbers.get("bias")
    return ModuleChange(
        a=None if a is None else a.clone(),
        b=None if b is None else b * scale,
        magnitude=None if magnitude is None else magnitude.flatten().clone(),
        bias=None if bias is None else bias.clone(),
        added_bias=None if b_bias is None else b_bias * scale,
        weight=None if weight is None else weight.clone(),
    )
