"""Where an engine's ranks find each other: the engine's side, a table of keys and values.

Owns the table. Ranks reach it over lines of their own (`rank_line.py`), so nobody without the key reads or sets
anything; torch's `TCPStore` listens on all addresses and lets everybody in. A request is JSON with values as Latin-1
text, and is answered at once: waiting is the rank's matter (`rank_store.py`). Knows no torch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from raydata_llm.engine.rank_line import Line, LineListener
from raydata_llm.engine.redaction import masked_logger

logger = masked_logger(__name__)


class StoreKeeper:
    """Keeps the table and answers the ranks until it is closed.

    Args:
        listener: Where the ranks call.
    """

    def __init__(self, listener: LineListener) -> None:
        self._listener = listener
        self.address = listener.address.address
        self._table = StoreTable()
        threading.Thread(target=self._accept, name="rank store", daemon=True).start()

    def close(self) -> None:
        """Take no more calls; the ranks are ended, or notice."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                _, line = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(line,), name="rank store line", daemon=True).start()

    def _answer(self, line: Line) -> None:
        try:
            while True:
                _, content = line.receive()
                line.connection.send_bytes(json.dumps(self._table.ask(*json.loads(content))).encode())
        except (EOFError, OSError):
            # The rank is gone.
            return
        except (ValueError, TypeError, KeyError):
            logger.exception("A rank asked the store for something that it does not have")
        finally:
            line.connection.close()


class StoreTable:
    """The values by key, as text; see torch's `Store` for what the operations mean."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        self._operations: dict[str, Callable[..., Any]] = {
            "set": self._set,
            "get": self._get,
            "add": self._add,
            "compare_set": self._compare_set,
            "delete": self._delete,
            "check": self._check,
            "count": lambda: len(self._values),
        }

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Do one operation.

        Raises:
            KeyError, TypeError, ValueError: for one that there is not.
        """
        with self._lock:
            return self._operations[operation](*arguments)

    def _set(self, key: str, value: str) -> None:
        self._values[key] = value

    def _get(self, keys: list[str]) -> list[str] | None:
        """The values of all these keys, None until all of them are there."""
        return [self._values[key] for key in keys] if self._check(keys) else None

    def _add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, "0")) + amount
        self._values[key] = str(total)
        return total

    def _compare_set(self, key: str, expected: str, desired: str) -> str:
        known = self._values.get(key)
        if known == expected or (known is None and not expected):
            self._values[key] = desired
            return desired
        return expected if known is None else known

    def _delete(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def _check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)
