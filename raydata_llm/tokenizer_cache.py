"""Tokenizers in the form that loads fastest, prepared once per node.

Owns a folder per tokenizer with `tokenizer.json` and the settings, written by the first process and read by all
others without `AutoTokenizer`, which imports torch, and without converting a GGUF vocabulary. Measured for
SmolLM2-135M, import and load (CPU seconds, peak memory; transformers 5.23): its GGUF 10.6 s and 415 MB, a folder
3.5 s and 305 MB, prepared 1.5 s and 120 MB. What plain texts and chats need is there without transformers too, as a
`LightTokenizer`.

Invariant: only a tokenizer whose prepared form is exactly the same is kept: its class adds no behaviour to
transformers' `TokenizersBackend`, and the reloaded state is compared before the folder gets its name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import types
from pathlib import Path
from typing import Any

from raydata_llm.engine.regular_file import check_regular
from raydata_llm.light_tokenizer import SETTINGS_FILE, LightSettings, LightTokenizer
from raydata_llm.model_cache import cache_folder, locked

_SETTINGS = (
    "special_tokens_map",
    "all_special_ids",
    "chat_template",
    "model_max_length",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "padding_side",
    "truncation_side",
)
# Changes with what a prepared folder holds.
_LAYOUT = b"2"
_BEHAVIOUR = (types.FunctionType, classmethod, staticmethod, property)
# These build the state that is kept; they do nothing after.
_CONSTRUCTION = {"__init__", "convert_to_native_format"}
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def tokenizer_stamp(source: Path) -> str:
    """A digest that changes with the tokenizer's files (their names, sizes and times) and the reading libraries."""
    digest = hashlib.blake2b(_LAYOUT, digest_size=12)
    for library in ("transformers", "tokenizers"):
        digest.update(f"{library} {_version(library)}\n".encode())
    for file in _tokenizer_files(source):
        if not file.is_dir():  # whoever reads one by that name says so
            check_regular(file)
        state = file.stat()
        digest.update(f"{file.absolute()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@functools.cache
def _version(library: str) -> str:
    # 2 ms each time, and every block asks for its tokenizer.
    return importlib.metadata.version(library)


def load_light(source: Path, stamp: str, *, trust_remote_code: bool) -> Any:
    """As `load_prepared`, as a `LightTokenizer` where one is prepared that can stand for it."""
    prepared = _prepared_folder(source, stamp)
    if not trust_remote_code and (prepared / SETTINGS_FILE).exists():
        return LightTokenizer(prepared, _load_from_prepared)
    return load_prepared(source, stamp, trust_remote_code=trust_remote_code)


def load_prepared(source: Path, stamp: str, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer from its prepared folder, or prepare it.

    Args:
        source: A model folder or GGUF file.
        stamp: Its `tokenizer_stamp`.
        trust_remote_code: Code that comes with the folder is run, and nothing is prepared.
    """
    if trust_remote_code:
        return _load_from_source(source, trust_remote_code=True)
    prepared = _prepared_folder(source, stamp)
    folder = prepared.parent
    if not prepared.exists() and _can_write(folder):
        with locked(folder):  # the other processes of a node wait here: one conversion instead of many at once
            if not prepared.exists() and not _as_is(prepared).exists():
                return _load_and_prepare(source, prepared)
    if prepared.exists():
        return _load_from_prepared(prepared)
    return _load_from_source(source, trust_remote_code=False)


def _prepared_folder(source: Path, stamp: str) -> Path:
    return cache_folder("tokenizers") / f"{source.stem}-{stamp}"


def _as_is(prepared: Path) -> Path:
    # The mark of a tokenizer that has no prepared form, so that no process waits for another to find out again.
    return prepared.with_name(f"{prepared.name}.as-is")


def _load_and_prepare(source: Path, prepared: Path) -> Any:
    tokenizer = _load_from_source(source, trust_remote_code=False)
    if not (_is_plain(tokenizer) and _prepare(tokenizer, prepared)):
        _as_is(prepared).touch()
    return tokenizer


def _can_write(folder: Path) -> bool:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(existing, os.W_OK)


def _tokenizer_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = [file for file in source.glob("*") if file.suffix in _TOKENIZER_SUFFIXES]
    return sorted([*files, *source.glob("additional_chat_templates/*")])


def _load_from_source(source: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if source.is_file():
        return AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)


def _load_from_prepared(prepared: Path) -> Any:
    # Named by its module: `from transformers import AutoTokenizer` would import torch (3 s).
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    return TokenizersBackend.from_pretrained(str(prepared))


def _is_plain(tokenizer: Any) -> bool:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend):
        return False
    added = [cls for cls in type(tokenizer).__mro__ if issubclass(cls, TokenizersBackend)][:-1]
    behaviour = {name for cls in added for name, value in vars(cls).items() if isinstance(value, _BEHAVIOUR)}
    return behaviour <= _CONSTRUCTION


def _prepare(tokenizer: Any, prepared: Path) -> bool:
    written = Path(tempfile.mkdtemp(prefix=".preparing-", dir=prepared.parent))
    try:
        tokenizer.save_pretrained(str(written))
        same = _state(_load_from_prepared(written)) == _state(tokenizer)
        if same:
            _prepare_light(tokenizer, written)
            os.rename(written, prepared)
        return same
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _prepare_light(tokenizer: Any, written: Path) -> None:
    settings = LightSettings.of(tokenizer)
    if settings is None:
        return
    settings.write(written)
    if not LightTokenizer(written, _load_from_prepared).is_equal(tokenizer):
        (written / SETTINGS_FILE).unlink()


def _state(tokenizer: Any) -> list[Any]:
    """All that a plain tokenizer's behaviour follows from."""
    return [tokenizer.backend_tokenizer.to_str(), *(getattr(tokenizer, name, None) for name in _SETTINGS)]
