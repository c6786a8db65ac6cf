"""Which adapter a row's `model` column may name, and where that lies.

Rows are data, often from strangers; the config is the program's. So a row names an adapter below the config's
`dynamic_lora_loading_path`, or one in a place of its `allowed_lora_sources`, and nothing else. The names are compared
as text here, before anything is opened, and the folders once more on the replica's node, after links are followed.
Knows no tensors, opens no files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ANYWHERE = "*"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# A drive, a scheme or a chain of schemes; a query, an escape or a pattern of a store; a folder of Windows; what a
# terminal obeys.
_UNSAFE = re.compile(r"[:?#%*\[\]\\\x00-\x1f\x7f]")


@dataclass(frozen=True)
class AdapterPlace:
    """Where an adapter lies.

    Args:
        path: A folder, a Hub id or an address.
        root: The folder on the replica's node that it may not lead out of; "" if it is not one of a folder.
    """

    path: str
    root: str = ""


def check_sources(sources: tuple[str, ...]) -> None:
    """Refuse what no row could name.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    for source in sources:
        plain = _plain(source).rstrip("/")
        known = "://" in plain or plain.startswith("/") or _HUB_NAME.fullmatch(plain)
        if source != ANYWHERE and not (known and _is_name(plain.rpartition("://")[2].lstrip("/"))):
            raise ValueError(
                f"allowed_lora_sources={source!r} is not valid: give a Hub organisation ('org') or repository "
                "('org/name'), an absolute folder, an address such as 's3://bucket/adapters', or '*' for any place"
            )


def place_of_adapter(name: str, folder: str, sources: tuple[str, ...]) -> AdapterPlace:
    """Find the place that a row names.

    Args:
        name: The row's.
        folder: The config's `dynamic_lora_loading_path`; "" for none.
        sources: The config's `allowed_lora_sources`; they come before the folder.

    Raises:
        ValueError: for a name that leads anywhere else, with the remedy.
    """
    for source in sources:
        if _is_below(name, source):
            return AdapterPlace(name, _plain(source) if _plain(source).startswith("/") else "")
    if not folder:
        raise ValueError(
            f"model={name!r} names an adapter, but the config does not allow that place for rows: set "
            "dynamic_lora_loading_path to the folder with the adapters, or allowed_lora_sources to a list of Hub "
            "organisations or repositories, folders and addresses that rows may name"
        )
    if not _is_name(name):
        raise ValueError(
            f"model={name!r} is no name of an adapter below dynamic_lora_loading_path={folder!r}: give a folder "
            "there, such as 'my-adapter', or allow its place with allowed_lora_sources=[...]"
        )
    return AdapterPlace(f"{folder.rstrip('/')}/{name}", "" if "://" in _plain(folder) else _plain(folder))


def check_inside(path: str, root: str) -> None:
    """Refuse a local adapter that links lead out of the folder where rows may choose.

    A link that is itself the adapter (`latest -> /runs/7`) is followed: whoever may write to the folder chose it. A row
    cannot go on through a link to what else lies behind it.

    Args:
        path: The adapter's local folder.
        root: The folder; the adapter is below it or is it.

    Raises:
        ValueError: if the adapter is elsewhere.
    """
    top = Path(_plain(root)).expanduser().resolve()
    found = Path(path)
    whole = found.resolve()
    through = found.parent.resolve()
    if not (whole == top or whole.is_relative_to(top) or through == top or through.is_relative_to(top)):
        raise ValueError(
            f"lora_path={path!r} leads out of {root!r} through a link: name the folder behind it in "
            "allowed_lora_sources, or put the link where the adapter's own folder would be"
        )


def _is_below(name: str, source: str) -> bool:
    """Whether the source is the place that is named, or holds it."""
    if source == ANYWHERE:
        return True
    plain, top = _plain(name), _plain(source).rstrip("/")
    if "://" in top or top.startswith("/"):
        return plain.rstrip("/") == top or (plain.startswith(f"{top}/") and _is_name(plain[len(top) + 1 :]))
    # On the Hub, where a revision may follow.
    repo, _, revision = plain.partition("@")
    is_repo = _HUB_NAME.fullmatch(repo) is not None and (not revision or _is_name(revision))
    return is_repo and (repo == top or repo.startswith(f"{top}/"))


def _is_name(name: str) -> bool:
    """Whether it is a path that goes down only."""
    return _UNSAFE.search(name) is None and not any(part.strip() in ("", ".", "..") for part in name.split("/"))


def _plain(path: str) -> str:
    return path.removeprefix("file://")
