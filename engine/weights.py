"""Loading a model's parameters, one tensor at a time.

Owns the formats: safetensors, GGUF, torch's pickles (through the weights-only loader alone) and seeded dummy weights.
Knows no model structure beyond parameter names and shapes.
Invariant: every parameter of the config is yielded once, in the right shape, dtype and place, or it is a ValueError.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from raydata_llm.engine.gguf_file import GgufFile
from raydata_llm.engine.model_files import ModelFiles, check_torch_file
from raydata_llm.engine.parameter_check import DrawnParameters, Parameters, is_harmless_extra
from raydata_llm.engine.safetensors_file import StoredTensor, cut_stored, read_header
from raydata_llm.engine.shard import Cut, ModelShard
from raydata_llm.engine.tensor_reader import read_tensors

NamedTensor = tuple[str, torch.Tensor]

# By the names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_weights(
    files: ModelFiles,
    config: DrawnParameters,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    name_of: Callable[[str], str | None] = str,
    shard: ModelShard | None = None,
) -> Iterator[NamedTensor]:
    """Yield every parameter of `config.parameter_shapes()` once, in any order, as `dtype` on `device`.

    With a shard, its parts of its parameters alone, and of files no more is read than that.

    On the CPU a tensor of a safetensors file that already has `dtype` is a view of the file: copy it to keep it.

    Args:
        files: Open files of the model.
        config: The model's config.
        dtype: What the weights are converted to.
        device: Where they are put.
        load_format: "dummy" draws the weights; any other takes those of `files`.
        seed: Of the dummy weights.
        name_of: The parameter's name by the file's; None for what is left out.
        shard: What of the model is wanted.

    Raises:
        ValueError: for missing, unknown or wrongly shaped parameters, and for damaged or unsafe files.
    """
    if load_format == "dummy":
        yield from _draw_weights(config, dtype=dtype, device=device, seed=seed, shard=shard)
        return
    if shard is not None and shard.place.num_ranks > 1:
        # A part fits the shard's shape whatever the whole is.
        files.check_weights(config)
        with closing(_read_shard(files, shard, device)) as parts:
            yield from _fitting(parts, files, config, shard.shapes, dtype=dtype, device=device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return
    with closing(_read_weights(files, config, device)) as weights:
        named = ((name_of(stored), tensor) for stored, tensor in weights)
        kept = ((name, tensor) for name, tensor in named if name is not None)
        yield from _fitting(kept, files, config, config.parameter_shapes(), dtype=dtype, device=device)
    if device.type == "cuda":
        # What tensors on their way took: the KV cache is sized by what is free on the device.
        torch.cuda.empty_cache()


def _fitting(
    weights: Iterable[NamedTensor],
    files: ModelFiles,
    config: Parameters,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[NamedTensor]:
    pending = set(shapes)
    for name, tensor in weights:
        if name not in shapes:
            raise _misfit(files, name, f"is unknown to {config.architecture}: give a model that fits its config")
        if name not in pending:
            raise _misfit(files, name, "is in two weight files: keep one of them")
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            found = f"is {tensor.dtype} {list(tensor.shape)}, but its config says {list(shapes[name])}"
            raise _misfit(files, name, f"{found}: give a model that fits its config")
        pending.remove(name)
        yield name, tensor.to(device=device, dtype=dtype)
    if pending:
        some = ", ".join(sorted(pending)[:3])
        raise ValueError(f"model={str(files.path)!r} lacks {len(pending)} parameters ({some}): give a complete model")


def _misfit(files: ModelFiles, name: str, problem: str) -> ValueError:
    return ValueError(f"parameter {name!r} of model={str(files.path)!r} {problem}")


def _read_weights(files: ModelFiles, config: Parameters, device: torch.device) -> Generator[NamedTensor, None, None]:
    is_stored = all(path.suffix == ".safetensors" for path in files.weight_files)
    if is_stored and device.type == "cuda":
        yield from read_tensors(stored_tensors(files.weight_files, config), device)
        return
    for path in files.weight_files:
        for name, tensor in _read_file(path):
            if not is_harmless_extra(name, config):
                yield name, tensor


def _read_shard(files: ModelFiles, shard: ModelShard, device: torch.device) -> Generator[NamedTensor, None, None]:
    """The shard's parts of its parameters; the disk reads those alone."""
    is_stored = all(path.suffix == ".safetensors" for path in files.weight_files)
    if is_stored:
        stored = stored_tensors(files.weight_files, shard.model)
        wanted = (
            (name, cut_stored(tensor, shard.parameters[name]), dtype)
            for name, tensor, dtype in stored
            if name in shard.parameters
        )
        yield from read_tensors(wanted, device)
        return
    for path in files.weight_files:
        if path.suffix == ".gguf":
            yield from _read_gguf_shard(path, shard)
        else:
            for name, tensor in _read_pickle(path):
                if name in shard.parameters:
                    yield name, take_part(tensor, shard.parameters[name])


def _read_gguf_shard(path: Path, shard: ModelShard) -> Iterator[NamedTensor]:
    file = GgufFile.open(path)
    for name in file.entries():
        if name not in shard.parameters:
            continue
        cut = shard.parameters[name]
        if cut is not None and cut.dim == 0:
            yield name, torch.from_numpy(file.read(name, slice(cut.start, cut.stop)))
        else:
            yield name, take_part(torch.from_numpy(file.read(name)), cut).contiguous()


def take_part(tensor: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    """A view of the part."""
    return tensor if cut is None else tensor.narrow(cut.dim, cut.start, cut.stop - cut.start)


def _read_file(path: Path) -> Iterator[NamedTensor]:
    if path.suffix == ".gguf":
        return _read_gguf(path)
    return _map_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def stored_tensors(paths: Iterable[Path], config: Parameters) -> Iterator[tuple[str, StoredTensor, torch.dtype]]:
    """What `read_tensors` is to read: the parameters of safetensors files in the order in which they lie there."""
    for path in paths:
        header = read_header(path)
        for name, stored in sorted(header.items(), key=lambda pair: pair[1].start):
            if is_harmless_extra(name, config):
                continue
            if stored.dtype not in DTYPES:
                known = ", ".join(DTYPES)
                raise ValueError(
                    f"{name} in weight file {str(path)!r} is {stored.dtype}, which is not read: use one of {known}"
                )
            yield name, stored, DTYPES[stored.dtype]


def _map_safetensors(path: Path) -> Iterator[NamedTensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"weight file {str(path)!r} is damaged ({error}): download it again") from error


def _read_gguf(path: Path) -> Iterator[NamedTensor]:
    file = GgufFile.open(path)
    for name in file.entries():
        yield name, torch.from_numpy(file.read(name))


def _read_pickle(path: Path) -> Iterator[NamedTensor]:
    # Only an archive can be mapped into memory.
    is_archive = check_torch_file(path) == "archive"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weight file {str(path)!r} holds pickled objects other than tensors, which could run code, and is "
            f"refused: convert it to safetensors where you trust it ({error})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"weight file {str(path)!r} is damaged ({error}): download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"weight file {str(path)!r} does not hold just named tensors: convert it to safetensors")
    yield from state.items()


def _draw_weights(
    config: DrawnParameters, *, dtype: torch.dtype, device: torch.device, seed: int, shard: ModelShard | None
) -> Iterator[NamedTensor]:
    for name, shape in config.parameter_shapes().items():
        if shard is not None and name not in shard.parameters:
            continue
        generator = torch.Generator(device).manual_seed(_name_seed(seed, name))
        weight = torch.empty(shape, dtype=torch.float32, device=device)
        weight.normal_(0.0, config.initializer_range, generator=generator)
        if name.lower().endswith("norm.weight"):
            weight += 1.0
        # Drawn whole, so that the weights do not depend on the number of ranks.
        yield name, take_part(weight, shard.parameters[name] if shard else None).to(dtype).contiguous()


def _name_seed(seed: int, name: str) -> int:
    """A parameter's own seed, so that its values do not depend on the order of drawing."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "little")
