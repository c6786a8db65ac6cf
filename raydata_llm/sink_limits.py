"""When a file is full: by bytes and by time, and within what the object store can hold meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydata_llm.sink_task import WrittenFile

# Blocks that wait for their file, or are in one that is being written, stay in the object store. Five files' worth
# (four under way and one that fills) take less than a third of it.
_STORE_SHARE = 1 / 16


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
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not valid: give a whole number from 1 on")
        if isinstance(self.file_seconds, bool) or not isinstance(self.file_seconds, (int, float)):
            raise ValueError(f"file_seconds={self.file_seconds!r} is not valid: give seconds")
        if not self.file_seconds > 0:
            raise ValueError(f"file_seconds={self.file_seconds!r} is not valid: give more than 0 seconds")

    def block_bytes(self, written: Sequence[WrittenFile]) -> float:
        """Bytes of blocks that fill a file, by how far rows shrank in files so far."""
        import ray

        store: float = ray.cluster_resources().get("object_store_memory", float("inf"))  # type: ignore[no-untyped-call]
        blocks, files = sum(file.block_bytes for file in written), sum(file.size for file in written)
        return min(self.file_bytes * (blocks / files if files else 1.0), store * _STORE_SHARE)
