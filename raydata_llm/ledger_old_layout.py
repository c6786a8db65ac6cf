"""Folders of earlier releases: what counts in them, read once, when the first run of this release begins there.

    path/_raydata_llm/current.json                            the key space of the visible files
    path/_raydata_llm/promotion.json                          a space that was taking that one's place when its run died
    path/_raydata_llm/<space>/<file name>.<file size>.ledger  an entry: keys and nothing else

Knows only how to read; the state that it gives is written and kept as any other.
"""

from __future__ import annotations

import json
from typing import Any

from raydata_llm.ledger_layout import FOLDER, STAGED, DamagedLedgerError, entries_among, is_error_file
from raydata_llm.ledger_state import State
from raydata_llm.sink_storage import Storage

CURRENT = f"{FOLDER}/current.json"
INTENT = f"{FOLDER}/promotion.json"


def read_old_state(storage: Storage, letters: Storage, spaces: set[str]) -> State | None:
    """What counts in a folder that runs of an earlier release wrote; None when none did.

    Args:
        storage: The folder.
        letters: The folder for error rows, which may be the same.
        spaces: The key spaces of its runs.

    Raises:
        DamagedLedgerError: when one of the two small files is damaged.
    """
    current = _read_json(
        storage,
        CURRENT,
        ("space",),
        f'write {{"space": "..."}} into it, with the name of the folder in {FOLDER!r} that holds the entries of the '
        "visible files, or give the job another folder",
    )
    intent = _read_json(
        storage, INTENT, ("to",), f"delete {INTENT!r} and run again, which does anew what its run had not finished"
    )
    if current is None and intent is None:
        return None
    visible = str((intent or current or {})["to" if intent else "space"])
    about = {visible: {name: value for name, value in (current or {}).items() if name != "space"}}
    stores = {store.label: store for store in (storage, letters)}
    files = {}
    for space in {*spaces, visible}:
        if intent is not None and space == str(intent.get("from")) != visible:
            continue
        folder = f"{FOLDER}/{space}"
        sizes: dict[str, int] = {}
        for store in stores.values():
            staged = {
                name.removesuffix(STAGED): size for name, size in store.sizes(folder).items() if name.endswith(STAGED)
            }
            found = {**staged, **store.sizes()} if space == visible else staged
            sizes |= {name: size for name, size in found.items() if store.label == _store(storage, letters, name).label}
        entries = entries_among(storage.sizes(folder))
        files[space] = frozenset(entry.name for entry in entries if sizes.get(entry.name) == entry.size)
    return State(space=visible, files=files, about=about)


def is_of_earlier_release(storage: Storage) -> bool:
    """Whether a run of an earlier release began here."""
    return storage.size(CURRENT) is not None


def forget_old_state(storage: Storage) -> None:
    """Remove the two files; an earlier release then refuses the folder, whose entries it cannot read."""
    for path in (INTENT, CURRENT):
        if storage.size(path) is not None:
            storage.delete(path)


def _store(storage: Storage, letters: Storage, name: str) -> Storage:
    return letters if is_error_file(name) else storage


def _read_json(storage: Storage, name: str, fields: tuple[str, ...], remedy: str) -> dict[str, Any] | None:
    if storage.size(name) is None:
        return None
    try:
        content = json.loads(storage.get(name))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(field), str) for field in fields):
        raise DamagedLedgerError(f"{name!r} in {storage.label!r} is damaged: {remedy}")
    return content
