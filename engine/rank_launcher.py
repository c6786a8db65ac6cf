"""What an engine asks of whoever starts its ranks, on this host or elsewhere.

Owns the two protocols. Knows no way of starting a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.rank_line import LineAddress


class RankHandle(Protocol):
    """A rank's process, as its launcher sees it."""

    def end(self) -> None:
        """Kill it."""
        ...

    def fate(self) -> str | None:
        """How it ended, such as `killed by signal 9`; None while it runs."""
        ...


class RankLauncher(Protocol):
    """Starts ranks."""

    @property
    def host(self) -> str | None:
        """The name under which the ranks reach this process; None if all are on its host."""
        ...

    def launch(self, address: LineAddress, num_ranks: int) -> Sequence[RankHandle]:
        """Start that many processes, each of which calls `rank_process.serve`.

        Raises:
            ValueError: where there is no place for them, with the numbers.
        """
        ...


LauncherFactory = Callable[[EngineConfig], RankLauncher]
