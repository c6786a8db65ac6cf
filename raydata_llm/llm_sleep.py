"""The methods of `LLM` that lend its memory to others for a while: `sleep`, `wake_up`, `is_sleeping`.

Owns which parts sleep. How they do is the engine's matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from raydata_llm.engine.engine import Engine

# In the order in which they wake.
_PARTS = ("weights", "kv_cache", "scheduling")


class SleepMethods(ABC):
    """What `LLM` has to free its device's memory and take it again."""

    _asleep: tuple[str, ...] = ()

    @abstractmethod
    def _engine_that_can_sleep(self, level: int) -> Engine:
        """The engine, with nothing under way in it; a ValueError says why it cannot sleep."""

    @abstractmethod
    def _settle_enqueued(self, mode: str) -> None:
        """Forget what is enqueued ("abort"), or run it to the end and keep its results ("wait")."""

    def sleep(self, level: int = 1, mode: Literal["abort", "wait", "keep"] | None = None) -> None:
        """Free memory of the device until `wake_up`; prefixes that were cached are forgotten.

        Prompts can be enqueued meanwhile, and run after.

        Args:
            level: 0: run nothing, keep everything. 1: KV and CUDA graphs are freed, the weights moved to pinned memory
                of the host (on a CPU they stay). 2: the weights are dropped as well, and read anew from the model's
                files.
            mode: What becomes of prompts that are enqueued: "abort" forgets them, "wait" runs them first, "keep" and
                None leave them as they are, which level 0 alone can do once they are under way.

        Raises:
            ValueError: for another level, while prompts are under way, and for engines of several processes.
        """
        if level not in (0, 1, 2) or isinstance(level, bool):
            raise ValueError(f"level={level!r} is not valid: give 0, 1 or 2")
        if mode not in (None, "abort", "wait", "keep"):
            raise ValueError(f"mode={mode!r} is not valid: choose 'abort', 'wait' or 'keep'")
        if self._asleep == ("scheduling",):
            self._asleep = ()
        if self._asleep:
            raise ValueError(f"sleep(level={level}) while {', '.join(self._asleep)} sleep: call wake_up() first")
        if mode in ("abort", "wait"):
            self._settle_enqueued(mode)
        if level:
            self._engine_that_can_sleep(level).sleep(level)
        self._asleep = _PARTS if level else ("scheduling",)

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Take back what `sleep` freed; a part that is awake stays so.

        Returns:
            Whether all parts are awake.

        Args:
            tags: Some of "weights", "kv_cache" and "scheduling"; None is all. The weights wake before the KV cache.
                With both awake, so is scheduling.

        Raises:
            ValueError: for other tags, or for waking the KV cache while the weights sleep.
        """
        if isinstance(tags, str) or not set(tags or ()) <= set(_PARTS):
            raise ValueError(f"tags={tags!r} is not valid: give a list of some of {', '.join(_PARTS)}")
        wanted = [part for part in _PARTS if part in self._asleep and (tags is None or part in tags)]
        if "kv_cache" in wanted and "weights" in self._asleep and "weights" not in wanted:
            raise ValueError(f"tags={tags!r} is not valid: wake the weights first, or with them")
        for part in wanted:
            if part != "scheduling":
                engine = self._engine_that_can_sleep(1)
                engine.wake_weights() if part == "weights" else engine.wake_kv_cache()
                if part == "kv_cache":
                    self._asleep = ()
            self._asleep = tuple(one for one in self._asleep if one != part)
        return not self._asleep

    @property
    def is_sleeping(self) -> bool:
        """Whether prompts have to wait for `wake_up`."""
        return bool(self._asleep)

    def _check_awake(self) -> None:
        if self._asleep:
            raise RuntimeError(f"this LLM sleeps ({', '.join(self._asleep)}): call wake_up() first")
