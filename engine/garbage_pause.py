"""Keeps Python's garbage collector from stopping the loop that feeds a device.

Owns when cycles are collected while an engine runs. Automatic collection comes when objects are made, so when many rows
begin, and looks at every prompt there is: for up to 80 ms at a time with 2,048 prompts of 2,112 tokens, a fifth of the
time of a whole run of such rows. Here it comes twice a minute, while the device has a step to run, and looks at what
was made since; at everything every ten minutes.

Invariant: on leaving, the collector is as it was found.
"""

from __future__ import annotations

import gc
import time
from types import TracebackType

_INTERVAL_SECONDS = 30.0
# Collections of which one looks at everything: a million prompts of 500 tokens take some seconds then.
_WHOLE_EVERY = 20


class GarbagePause:
    """A context in which only `collect_if_due` collects; where collection is off already, it changes nothing."""

    def __enter__(self) -> GarbagePause:
        """Turn automatic collection off."""
        self._is_owner = gc.isenabled()
        self._may_freeze = self._is_owner and gc.get_freeze_count() == 0
        self._last = time.monotonic()
        self._num_collections = 0
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Turn it on again."""
        if self._may_freeze:
            # All that was made meanwhile is old now: otherwise the next object made would have it looked at first.
            gc.freeze()
            gc.unfreeze()
        if self._is_owner:
            gc.enable()

    def collect_if_due(self) -> None:
        """Collect, if it is time to; for a moment when the device has work."""
        if not self._is_owner or time.monotonic() - self._last < _INTERVAL_SECONDS:
            return
        self._num_collections += 1
        if self._may_freeze and self._num_collections % _WHOLE_EVERY == 0:
            gc.unfreeze()
        gc.collect()
        if self._may_freeze:
            gc.freeze()  # what lives on is left alone for a while
        self._last = time.monotonic()
