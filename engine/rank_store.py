"""Where an engine's ranks find each other: a rank's side, as torch wants it.

Owns the waiting: a key that is not there yet is asked for again, so that no thread of this process keeps another from
asking. Knows nothing of what torch, gloo and NCCL write there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import Store

from raydata_llm.engine.rank_line import Line

# Between two questions for a key that is not there yet, doubled up to the longest.
_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.05
_ASK = b"?"


class RankStore(Store):
    """A `torch.distributed.Store` over a line to the engine.

    torch calls these methods from threads of its own as well, and holds no reference to this object: whoever makes
    process groups of it must.

    Args:
        line: To a `StoreKeeper`.
        timeout_s: How long a key is waited for.
    """

    def __init__(self, line: Line, timeout_s: float) -> None:
        super().__init__()
        self._line = line
        self._turn = threading.Lock()
        self._timeout = timedelta(seconds=timeout_s)

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        self._ask("set", key, _text(value))

    def get(self, key: str) -> bytes:
        """A key's value, waited for."""
        return self._wait_for([key], self._timeout)[0].encode("latin-1")

    def add(self, key: str, amount: int) -> int:
        """Add to a number; returns the sum."""
        return int(self._ask("add", key, amount))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a key if it holds what is expected; returns what it holds then."""
        return str(self._ask("compare_set", key, _text(expected), _text(desired))).encode("latin-1")

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all these keys are there."""
        return bool(self._ask("check", list(keys)))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all these keys are there."""
        self._wait_for(keys, timeout or self._timeout)

    def delete_key(self, key: str) -> bool:
        """Remove a key; returns whether it was there."""
        return bool(self._ask("delete", key))

    def num_keys(self) -> int:
        """How many keys there are."""
        return int(self._ask("count"))

    # As torch calls them.
    deleteKey = delete_key
    getNumKeys = num_keys

    def clone(self) -> RankStore:
        """The store itself: threads may ask at once."""
        return self

    def _wait_for(self, keys: Sequence[str], timeout: timedelta) -> list[str]:
        deadline, wait = time.monotonic() + timeout.total_seconds(), _FIRST_WAIT
        while (values := self._ask("get", list(keys))) is None:
            if time.monotonic() > deadline:
                seconds = timeout.total_seconds()
                raise DistStoreError(f"the other ranks did not set {', '.join(keys)} within {seconds:g} s")
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        return [str(value) for value in values]

    def _ask(self, operation: str, *arguments: Any) -> Any:
        with self._turn:
            self._line.send_json(_ASK, [operation, *arguments])
            return json.loads(self._line.connection.recv_bytes())


def _text(value: str | bytes) -> str:
    """A value as the line carries it: each byte a character."""
    return (value.encode() if isinstance(value, str) else bytes(value)).decode("latin-1")
