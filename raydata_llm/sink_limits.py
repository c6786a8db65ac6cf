"""When a file is full: by bytes and by time, and within what the object store can hold meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydata_llm.engine.regular_file import shown

if TYPE_CHECKING:
    from raydata_llm.sink_task import WrittenFile

# Blocks that wait for their file, or are in one that is being written, stay in the object store. Five files' worth
# (four under way and one that fills) take less than a third of it.
_STORE_SHARE = 1 / 16
# S3 takes 5 TB in one object.
_MOST_BYTES, _MOST_FILES, _MOST_SECONDS = 5 << 40, 1024, 1e9


@dataclass(frozen=True, kw_only=True)
class FileLimits:
    """Sizes of files.

    Args:
        file_bytes: Of a file, about.
        file_seconds: Between a file's first row and its upload at most.
        files_at_once: Files that are being written at once.
    """

    file_bytes: int
    file_seconds: float
    files_at_once: int

    def __post_init__(self) -> None:
        for name in ("file_bytes", "files_at_once"):
            value = getattr(self, name)
            most = _MOST_BYTES if name == "file_bytes" else _MOST_FILES
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}={shown(value)} is not valid: give a whole number from 1 to {most}")
        seconds = self.file_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise ValueError(f"file_seconds={shown(seconds)} is not valid: give seconds")
        if not 0 < seconds <= _MOST_SECONDS:
            raise ValueError(f"file_seconds={shown(seconds)} is not valid: give more than 0 seconds, 1e9 at most")

    def block_bytes(self, written: Sequence[WrittenFile]) -> float:
        """Bytes of blocks that fill a file, by how far rows shrank in files so far."""
        import ray

        store: float = ray.cluster_resources().get("object_store_memory", float("inf"))  # type: ignore[no-untyped-call]
        blocks, files = sum(file.block_bytes for file in written), sum(file.size for file in written)
        return min(self.file_bytes * (blocks / files if files else 1.0), store * _STORE_SHARE)
