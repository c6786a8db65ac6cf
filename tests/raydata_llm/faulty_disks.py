"""Disks on which writing goes wrong in a way that a test decides. Workers import this module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class HoldingDisk(LocalFileSystem):  # type: ignore[misc]
    """A disk on which the third file of answers takes for ever to begin, or to be noticed when it is there.

    Args:
        marker: A file to touch then.
        after: Whether the file is there by then.
    """

    def __init__(self, marker: str, after: bool, **options: Any) -> None:
        super().__init__(**options)
        self._marker = marker
        self._after = after

    def _hold(self, path: str) -> None:
        if "part-" in path and "-000002" in path and "_raydata_llm" not in path:
            Path(self._marker).touch()
            time.sleep(600)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if not self._after and mode == "wb":
            self._hold(path)
        return super()._open(path, mode, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        super().mv(path1, path2, **options)
        if self._after:
            self._hold(path2)


class FullDisk(LocalFileSystem):  # type: ignore[misc]
    """A disk that fills up with the third file of answers, until a marker is there."""

    def __init__(self, marker: str, **options: Any) -> None:
        super().__init__(**options)
        self._marker = marker

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and "-000002" in path and "_raydata_llm" not in path and not Path(self._marker).exists():
            raise OSError(28, "No space left on device", path)
        return super()._open(path, mode, **options)


class DeadlyDisk(LocalFileSystem):  # type: ignore[misc]
    """A disk that kills the first process that has written a file of answers."""

    def __init__(self, marker: str, **options: Any) -> None:
        super().__init__(**options)
        self._marker = marker

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        super().mv(path1, path2, **options)
        if "part-" in path2 and not Path(self._marker).exists():
            Path(self._marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
