"""Listens to all ranks of an engine, and finds out when one is gone, fails or hangs.

Owns the engine's receiving ends, what the ranks have said and nobody has asked for yet, and the verdict. Knows no
batches. Invariant: whatever ends a rank (its death, an exception, silence, a step in which nothing moves, a frame that
is not understood), all ranks are ended, and whoever waits here or comes later gets one error with what that rank said.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from raydata_llm.engine.phases import announce
from raydata_llm.engine.rank_launcher import RankHandle
from raydata_llm.engine.rank_line import CALLED, FAILURE, HEARTBEAT, LOADED, PHASE, READY, RESULT, Line, RankError

# A rank's heartbeat comes each second; a process that was stopped, or whose host is gone, sends none.
_SILENCE_SECONDS = 12.0
# Steps are under way, and in this time no rank ended one or, on a CPU, did any work.
_STANDSTILL_SECONDS = 15.0
# CPU seconds that count as work, over all ranks.
_WORK_SECONDS = 1.0
# When one rank fails, its neighbours do as well: how long the others' words are waited for.
_LAST_WORDS_SECONDS = 1.0
# In the traceback of a rank that only lost its neighbour.
_ECHOES = ("DistBackendError", "gloo", "Connection closed", "NCCL")


@dataclass
class WatchedRank:
    """One rank, and what is known of it."""

    handle: RankHandle
    line: Line | None = None
    last_sign: float = field(default_factory=time.monotonic)
    num_steps: int = 0
    cpu: float = 0.0
    stack: str | None = None
    last_words: str | None = None
    is_gone: bool = False


class RankWatch:
    """See the module's docstring.

    Args:
        ranks: All of them, each with its line by the time of `start`.
    """

    def __init__(self, ranks: list[WatchedRank]) -> None:
        self._ranks = ranks
        self._changed = threading.Condition()
        self._told: dict[bytes, list[Any]] = {LOADED: [], READY: [], RESULT: [], CALLED: []}
        self._error: Exception | None = None
        self._ended = False
        self._num_launched = self._num_results = 0
        self._moved_at = time.monotonic()
        self._work = 0.0
        # A step on a GPU costs its process no CPU time, so there only its end is a sign of work.
        self.on_cpu = False

    def start(self) -> None:
        """Listen from now on."""
        now = time.monotonic()
        for rank in self._ranks:
            rank.last_sign = now
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def end(self) -> None:
        """Listen no more; what comes of the ranks from now on is no error."""
        with self._changed:
            self._ended = True

    def step_launched(self) -> None:
        """The ranks are about to be given a step."""
        with self._changed:
            if self._num_launched == self._num_results:
                self._moved_at = time.monotonic()
            self._num_launched += 1

    def wait_for(self, kind: bytes, count: int) -> list[Any]:
        """Wait until that many frames of a kind are there.

        Raises:
            RankError, ValueError: when a rank has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._told[kind]) >= count)
        self.raise_error()
        return self._told[kind]

    def next_answers(self, count: int, timeout: float | None) -> list[bytes]:
        """What the ranks answer to a call.

        Raises:
            TimeoutError: when they take longer; what they answer later is dropped with the next call's.
            RankError, ValueError: when a rank has ended.
        """
        with self._changed:
            answered = self._changed.wait_for(
                lambda: self._error is not None or len(self._told[CALLED]) >= count, timeout=timeout
            )
        self.raise_error()
        if not answered:
            raise TimeoutError(f"the ranks have not answered within timeout={timeout:g} s")
        with self._changed:
            answers, self._told[CALLED] = self._told[CALLED], []
        return answers

    def next_result(self) -> bytes:
        """The oldest step's result, as soon as it is there."""
        self.wait_for(RESULT, 1)
        with self._changed:
            data: bytes = self._told[RESULT].pop(0)
        return data

    def raise_error(self) -> None:
        """Raise what ended the ranks, if they have ended."""
        if self._error is not None:
            raise self._error

    def explain_broken_line(self) -> None:
        """A frame could not be sent: raise why, which the watch is about to find out."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, timeout=_SILENCE_SECONDS)
        self.raise_error()
        raise RankError("a rank's line is broken")

    def _watch(self) -> None:
        try:
            while not self._ended:
                self._take_frames(1.0)
                suspect = self._suspect()
                if suspect is not None:
                    return self._fail(suspect)
        except Exception as error:
            # Without its watch an engine would wait for ever. After `end`, it is the lines being closed.
            self._end_with(RankError(f"the watch over the ranks failed: {error!r}"))

    def _take_frames(self, seconds: float) -> None:
        lines = {rank.line.connection: rank for rank in self._ranks if rank.line is not None and not rank.is_gone}
        for ready in wait(list(lines), timeout=seconds):
            rank = next(rank for connection, rank in lines.items() if connection is ready)
            assert rank.line is not None
            try:
                kind, content = rank.line.receive()
            except (EOFError, OSError):
                rank.is_gone = True
                continue
            try:
                self._take(rank, kind, content)
            except (ValueError, KeyError, TypeError) as error:
                rank.last_words = f"a frame of kind {kind!r} and {len(content)} bytes is not understood: {error!r}"

    def _take(self, rank: WatchedRank, kind: bytes, content: bytes) -> None:
        now = rank.last_sign = time.monotonic()
        if kind == HEARTBEAT:
            told = json.loads(content)
            if told["num_steps"] > rank.num_steps:
                self._moved_at = now
            rank.num_steps, rank.cpu, rank.stack = told["num_steps"], told["cpu"], told["stack"]
        elif kind == FAILURE:
            told = json.loads(content)
            rank.last_words = told["traceback"]
            if told["is_value_error"]:
                self._end_with(ValueError(told["message"]))
        elif kind == PHASE:
            announce(content.decode())
        else:
            with self._changed:
                self._told[kind].append(content if kind in (RESULT, CALLED) else json.loads(content or b"null"))
                if kind == RESULT:
                    self._num_results += 1
                    self._moved_at = now
                self._changed.notify_all()

    def _suspect(self) -> str | None:
        """What is wrong, if something is."""
        if self._error is not None:
            return None
        now = time.monotonic()
        for number, rank in enumerate(self._ranks):
            if rank.is_gone or rank.last_words is not None:
                return f"rank {number} of {len(self._ranks)} failed"
            if now - rank.last_sign > _SILENCE_SECONDS:
                silent = f"rank {number} of {len(self._ranks)} hangs: no sign of life for {now - rank.last_sign:.0f} s"
                return f"{silent}, so no traceback either (its process is stopped, or its host is gone)"
        if self._num_launched > self._num_results and self._stands_still(now):
            return f"the ranks hang: no step ended for {now - self._moved_at:.0f} s"
        return None

    def _stands_still(self, now: float) -> bool:
        work = sum(rank.cpu for rank in self._ranks)
        if self.on_cpu and work > self._work + _WORK_SECONDS:
            # Steps of large models take long on a CPU; one that hangs waits.
            self._work, self._moved_at = work, now
        return now - self._moved_at > _STANDSTILL_SECONDS

    def _fail(self, suspect: str) -> None:
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline and any(not rank.is_gone for rank in self._ranks):
            self._take_frames(0.1)
        fates = [self._fate(number, rank) for number, rank in enumerate(self._ranks)]
        # What was there first is told first: a rank that is gone, then one with an error of its own.
        told = [text for _, text in sorted((fate for fate in fates if fate is not None), key=lambda fate: fate[0])]
        self._end_with(RankError("\n".join([suspect, *told])))

    def _fate(self, number: int, rank: WatchedRank) -> tuple[int, str] | None:
        fate = rank.handle.fate()
        if rank.last_words is not None:
            is_echo = any(word in rank.last_words for word in _ECHOES)
            return 2 if is_echo else 0, f"rank {number}:\n{rank.last_words}"
        if fate is not None or rank.is_gone:
            return 1, f"rank {number}: {fate or 'its line is broken'}"
        return None if rank.stack is None else (3, f"rank {number} is at:\n{rank.stack}")

    def _end_with(self, error: Exception) -> None:
        with self._changed:
            if self._ended:
                return
            self._error = self._error or error
            self._changed.notify_all()
        for rank in self._ranks:
            rank.handle.end()
