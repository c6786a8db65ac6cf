"""What a user names as the model, turned into files on this node, and checked before a GPU is taken.

Owns the meaning of `model_source`: a local folder, a GGUF file, a Hub id, or a remote folder such as `s3://...`.
Knows no tokens and no rows. Importing it imports neither torch nor transformers, and reads nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.model_cache import fetch_model
from raydata_llm.redaction import masked_logger, redact
from raydata_llm.remote_model import RemoteModel, wanted_files

if TYPE_CHECKING:
    from raydata_llm.engine.model_files import ModelFiles
    from raydata_llm.engine.pooling_params import PoolingTask

logger = masked_logger(__name__)

# How messages about a model begin, here and in `remote_model.py` and `tokenizer.py`.
_FIELD = "model_source="

_KINDS = "give a folder with config.json, a .gguf file, a Hub id such as org/name, or s3://bucket/folder"
# A Hub that is there answers within a second; a network without it may swallow the question.
_HUB_SECONDS = 5.0
_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*(/[\w][\w.-]*)?)(@(?P<revision>[^@\s]+))?")
# A GGUF header (the vocabulary is in it) is 2-10 MB; 64 MB holds any known one.
_GGUF_HEADER_BYTES = 64 << 20
# The archive's end record and its longest comment.
_ZIP_END_BYTES = 22 + (1 << 16)


def resolve_model(model_source: str, *, weights: bool = True, load_format: str = "auto") -> str:
    """Return the local path of a model's folder or GGUF file, fetching what is remote once per node.

    Args:
        model_source: A local folder or GGUF file, a Hub id `org/name[@revision]`, or a remote folder or GGUF file.
        weights: False fetches only what configs and tokenizers need; a later call with True completes the folder.
        load_format: EngineConfig's; it tells which weights to fetch ("dummy": none).

    Raises:
        ValueError: when there is nothing to read there, with the remedy.
    """
    if not isinstance(model_source, str) or not model_source.strip():
        raise ValueError(f"model_source={model_source!r} is not valid: {_KINDS}")
    weights = weights and load_format != "dummy"
    if is_remote(model_source):
        fetched = fetch_model(model_source, weights=weights, load_format=load_format)
        return _check_folder(redact(model_source), fetched)
    local = local_path(model_source)
    if os.path.exists(local):  # no name is too long for this question, unlike Path.exists'
        return _check_folder(model_source, str(local))
    return _check_folder(model_source, fetch_from_hub(model_source, weights=weights, load_format=load_format))


def with_revision(model_source: str, revision: Any, field: str = "revision") -> str:
    """A Hub id at one of its revisions, as `org/name@revision`.

    Args:
        revision: A branch, tag or commit; None and "main" are what the Hub gives anyway.
        field: How the revision was given.

    Raises:
        ValueError: for a revision of what is not on the Hub.
    """
    if revision is None or revision == "main":
        return model_source
    named = None if is_remote(model_source) or _is_local(model_source) else _HUB_ID.fullmatch(model_source)
    if not isinstance(revision, str) or named is None or named["revision"] not in (None, revision):
        raise ValueError(
            f"{field}={revision!r} is not valid with model_source={redact(model_source)!r}: it names a version of a "
            "model on the Hub; leave it out, or give the model's id without one"
        )
    return f"{named['repo']}@{revision}"


def settle_hf_overrides(model_source: str, overrides: Any) -> Any:
    """The values that a function of `hf_overrides` changes in a model's config; other overrides are given back.

    Raises:
        ValueError: when the config cannot be read, or the function raises.
    """
    from raydata_llm.engine.model_files import settle_overrides

    if not callable(overrides):
        return overrides
    if not is_remote(model_source):
        return settle_overrides(resolve_model(model_source, weights=False), overrides)
    remote = RemoteModel(model_source)
    with tempfile.TemporaryDirectory(prefix="raydata_llm-") as folder:
        return settle_overrides(_outline(remote, Path(folder), "dummy"), overrides)


def check_model(model_source: str, engine_config: EngineConfig, task: PoolingTask | None = None) -> None:
    """Check what a driver can, without torch, without weights and before any GPU is taken.

    The config is translated, max_model_len is compared with it, and so are the weights' names, shapes and file
    sizes: of remote safetensors and GGUF files the headers are read. Of a Hub model only the config is checked.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    if isinstance(model_source, str) and is_remote(model_source):
        _check_remote(model_source, engine_config, task)
        return
    path = resolve_model(model_source, weights=False)
    load_format = engine_config.load_format if _is_local(model_source) else "dummy"
    _check_files(path, engine_config, load_format=load_format, task=task)


@contextmanager
def named_as(field: str) -> Iterator[None]:
    """Let a `ValueError` about a model call it by the name under which it was given."""
    try:
        yield
    except ValueError as error:
        told = str(error)
        if not told.startswith(_FIELD):
            raise
        raise ValueError(f"{field}={told.removeprefix(_FIELD)}") from error.__cause__


def is_remote(model_source: str) -> bool:
    """Whether it is in a store, not in a folder and not on the Hub."""
    return "://" in model_source and not model_source.startswith("file://")


def local_path(model_source: str) -> Path:
    """Where it lies if it is on this node."""
    return Path(model_source.removeprefix("file://")).expanduser()


def _is_local(model_source: str) -> bool:
    return os.path.exists(local_path(model_source))


def _check_folder(model_source: str, path: str) -> str:
    # A folder that only holds a tokenizer is fine here: `tokenizer=` may name one.
    folder = Path(path)
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise ValueError(f"model_source={model_source!r} is a file, but no .gguf file: {_KINDS}")
    elif not any((folder / name).exists() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        ggufs = sorted(found.name for found in folder.glob("*.gguf"))
        hint = f"name the file itself, such as {ggufs[0]}" if ggufs else "check that it is a model's own folder"
        raise ValueError(f"model_source={model_source!r} has no config.json in the folder: {hint}")
    return path


def _check_files(path: str, engine_config: EngineConfig, *, load_format: str, task: PoolingTask | None = None) -> None:
    from raydata_llm.engine.encoder_config import ENCODER_FAMILIES
    from raydata_llm.engine.model_files import ModelFiles
    from raydata_llm.engine.shard import check_split

    files = ModelFiles.open(path, load_format=load_format, hf_overrides=engine_config.hf_overrides)
    if task is not None:
        _check_pooling(files, engine_config, task)
        return
    if files.hf_config.get("model_type") in ENCODER_FAMILIES:
        raise ValueError(
            f"task_type='generate' does not fit the model in {path}, which gives no text: set task_type to 'embed', "
            "'classify' or 'score'"
        )
    model_config = files.model_config()
    check_split(model_config, engine_config.tensor_parallel_size, engine_config.pipeline_parallel_size)
    files.check_weights(model_config)
    longest, wanted = model_config.context_length, engine_config.max_model_len
    if wanted is not None and wanted > longest:
        raise ValueError(
            f"max_model_len={wanted} is not valid: the model was made for {longest} tokens (max_position_embeddings "
            f"and its RoPE scaling); give {longest} or less, or scale RoPE with hf_overrides={{'rope_scaling': ...}}"
        )


def _check_pooling(files: ModelFiles, engine_config: EngineConfig, task: PoolingTask) -> None:
    from raydata_llm.engine.pooling_model import PoolingModel

    model = PoolingModel.open(files, engine_config)
    if task not in model.tasks:
        raise ValueError(
            f"task_type={task!r} does not fit this {model.architecture}, which does {', '.join(model.tasks)}: "
            "choose another task_type or model"
        )
    files.check_weights(model, model.parameter_name)
    for layer, own in model.layer_files(files, engine_config.load_format):
        own.check_weights(layer)
    model.max_model_len(engine_config)


def _check_remote(uri: str, engine_config: EngineConfig, task: PoolingTask | None) -> None:
    remote = RemoteModel(uri)
    with tempfile.TemporaryDirectory(prefix="raydata_llm-") as folder:
        path = _outline(remote, Path(folder), engine_config.load_format)
        try:
            _check_files(path, engine_config, load_format=engine_config.load_format, task=task)
        except ValueError as error:
            raise ValueError(str(error).replace(path, remote.uri)) from error


def _outline(remote: RemoteModel, folder: Path, load_format: str) -> str:
    """Write the remote model's files as far as a check reads them; the rest of a weight file is a hole."""
    names = wanted_files(remote.files, weights=True, load_format=load_format)
    for name in names:
        size = remote.files[name].size
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as out:
            out.truncate(size)
            for start, length in _checked_ranges(remote, name):
                out.seek(start)
                out.write(remote.read(name, start, min(length, size - start)))
    return str(folder / names[0]) if remote.uri.endswith(".gguf") else _check_folder(remote.uri, str(folder))


def _checked_ranges(remote: RemoteModel, name: str) -> list[tuple[int, int]]:
    """Where in a file the checks read: (start, length) pairs."""
    size = remote.files[name].size
    if name.endswith(".gguf"):
        return [(0, _GGUF_HEADER_BYTES)]
    if name.endswith(".safetensors"):
        length = int.from_bytes(remote.read(name, 0, 8), "little")
        return [(0, 8 + min(length, size))]
    if name.endswith(".bin"):  # a zip archive, its directory at the end
        return [(0, 64), (max(0, size - _ZIP_END_BYTES), _ZIP_END_BYTES)]
    return [(0, size)]


def fetch_from_hub(model_source: str, *, weights: bool, load_format: str) -> str:
    """The local path of what the Hub calls so.

    Raises:
        ValueError: when it cannot be read there.
    """
    named = _HUB_ID.fullmatch(model_source)
    if named is None:
        raise ValueError(f"model_source={model_source!r} not found: no such folder or file here; {_KINDS}")
    from huggingface_hub import snapshot_download

    repo, revision = named["repo"], named["revision"]
    try:
        names = _list_hub_files(repo, revision)
        chosen = wanted_files(names, weights=weights, load_format=load_format)
        return str(snapshot_download(repo, revision=revision, allow_patterns=chosen))
    except _HubAway as away:
        return _cached_by_hub(model_source, repo, revision, away)
    except (OSError, ValueError) as error:  # what huggingface_hub raises for ids and answers
        raise ValueError(
            f"model_source={model_source!r} not found: it is neither a folder nor a .gguf file here, nor a Hub id "
            f"that can be read ({str(error).splitlines()[0]}); {_KINDS}; a gated model needs HF_TOKEN"
        ) from error


class _HubAway(Exception):
    """The Hub gave no answer; in words, why."""


def _list_hub_files(repo: str, revision: str | None) -> list[str]:
    """The repository's files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        # Asks once; `list_repo_files` tries for half a minute whether there is a network.
        found = hub.model_info(repo, revision=revision, timeout=_HUB_SECONDS)
        return [file.rfilename for file in found.siblings or []]
    except HFValidationError:
        raise
    except HfHubHTTPError:  # it answers, but may be busy, where trying again helps
        return hub.list_repo_files(repo, revision=revision)
    except OfflineModeIsEnabled:
        raise _HubAway("HF_HUB_OFFLINE=1 keeps the Hub from being asked") from None
    except Exception as error:  # the transport's errors change their package with huggingface_hub's version
        cause = " ".join(str(error).split()) or type(error).__name__
        raise _HubAway(redact(f"the Hub at {hub.endpoint} cannot be reached ({cause})")) from error


def _cached_by_hub(model_source: str, repo: str, revision: str | None, away: _HubAway) -> str:
    """What an earlier download left in the Hub's own cache."""
    from huggingface_hub import constants, snapshot_download

    try:
        path = str(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_source={model_source!r} not found: there is no such folder or .gguf file here, {away}, and its "
            f"cache {constants.HF_HUB_CACHE} does not hold it; download it where there is a network and give its "
            "folder, or set HF_ENDPOINT to a mirror"
        ) from error
    logger.warning("%s is taken from the Hub's cache: %s", repo, away)
    return path
