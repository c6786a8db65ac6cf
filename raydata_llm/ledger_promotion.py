"""One key space's files take the place of another's: out with the old ones, in with the new.

The intent is written first, so a run that dies in between is followed by one that finishes its work; any step may be
the first of that. Invariant: files of two spaces are never visible together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raydata_llm.ledger_layout import (
    FOLDER,
    STAGED,
    current_space,
    in_parallel,
    read_entries,
    read_json,
    write_current,
)
from raydata_llm.sink_storage import Storage

_INTENT = f"{FOLDER}/promotion.json"


def promote(storage: Storage, letters: Storage, space: str, about: Mapping[str, Any]) -> None:
    """Make the staged files of a space the visible ones.

    Args:
        storage: The folder.
        letters: The folder for error rows, which may be the same.
        space: The space.
        about: What it stands for, for people who look.
    """
    intent = {"from": current_space(storage), "to": space, "about": dict(about)}
    storage.put(_INTENT, json.dumps(intent).encode())
    finish_promotion(storage, letters)


def finish_promotion(storage: Storage, letters: Storage) -> None:
    """Do what an earlier run meant to, if it died before it was done."""
    intent = read_json(storage, _INTENT)
    if intent is None:
        return
    old, new = intent["from"], intent["to"]
    entries = read_entries(storage, old)
    in_parallel(lambda entry: (letters if entry.is_error else storage).delete(entry.name), entries)
    in_parallel(lambda entry: storage.delete(entry.path(old)), entries)
    for place in {store.label: store for store in (storage, letters)}.values():
        _reveal(place, f"{FOLDER}/{new}")
    write_current(storage, new, intent["about"])
    storage.delete(_INTENT)


def _reveal(storage: Storage, folder: str) -> None:
    def move(name: str) -> None:
        staged, visible = f"{folder}/{name}", name.removesuffix(STAGED)
        try:
            storage.move(staged, visible)
        except OSError:
            # Another run may do the same at the same time.
            if storage.size(staged) is not None or storage.size(visible) is None:
                raise

    in_parallel(move, [name for name in storage.sizes(folder) if name.endswith(STAGED)])
