"""Adapters on the host, each read once a process.

Owns what is kept and for how long. Knows no device.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

from raydata_llm.engine.adapter import Adapter, read_adapter
from raydata_llm.engine.model_config import ModelConfig

# Adapters that are kept once read. Most are small; whole weights of an LM head take gigabytes.
_MOST_KEPT = 32
_MOST_BYTES = 8 << 30

_Key = tuple[str, int, ModelConfig, int]


class AdapterCache:
    """The adapters that were read last; the newest is kept whatever its size."""

    def __init__(self, most_kept: int = _MOST_KEPT, most_bytes: int = _MOST_BYTES) -> None:
        self._most_kept, self._most_bytes = most_kept, most_bytes
        self._adapters: OrderedDict[_Key, Adapter] = OrderedDict()
        # When each folder's adapter was written, as last read.
        self._stamps: dict[str, int] = {}
        self._lock = Lock()

    def load(self, path: str, config: ModelConfig, max_rank: int) -> Adapter:
        """As `load_adapter`."""
        return self._get(path, adapter_stamp(path), config, max_rank)

    def kept(self, path: str, config: ModelConfig, max_rank: int) -> Adapter:
        """As `kept_adapter`."""
        return self._get(path, adapter_stamp(path) or self._stamps.get(path, 0), config, max_rank)

    def _get(self, path: str, stamp: int, config: ModelConfig, max_rank: int) -> Adapter:
        key = (path, stamp, config, max_rank)
        with self._lock:
            if key not in self._adapters:
                self._adapters[key] = read_adapter(Path(path), config, max_rank=max_rank)
            self._adapters.move_to_end(key)
            self._stamps[path] = stamp
            while len(self._adapters) > 1 and (
                len(self._adapters) > self._most_kept or self._num_bytes() > self._most_bytes
            ):
                self._adapters.popitem(last=False)
            return self._adapters[key]

    def _num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._adapters.values())


_cache = AdapterCache()


def adapter_stamp(path: str) -> int:
    """When a folder's adapter was written; 0 if there is none."""
    settings = Path(path) / "adapter_config.json"
    return settings.stat().st_mtime_ns if settings.is_file() else 0


def load_adapter(path: str, config: ModelConfig, max_rank: int) -> Adapter:
    """Read a folder's adapter, once a process; a new one under an old name is read.

    Raises:
        ValueError: for what is no adapter of this model.
    """
    return _cache.load(path, config, max_rank)


def kept_adapter(path: str, config: ModelConfig, max_rank: int) -> Adapter:
    """As `load_adapter`; if the folder has vanished since a request with it was accepted, as it was read then."""
    return _cache.kept(path, config, max_rank)
