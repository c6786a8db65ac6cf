"""An engine's ranks: started together, fed the same steps, and ended together as soon as one of them is gone.

Owns the engine's ends of the lines, the meeting place of the ranks, and the watch. Knows no requests; how processes
are started is the launcher's matter. Invariant: whatever ends a rank (its death, an exception, silence, a step in which
nothing moves), the next call of the engine raises with what that rank said, and no rank is left.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

from torch._C._distributed_c10d import TCPStore

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.kv_budget import Sizes
from raydata_llm.engine.logprobs import PromptPiece
from raydata_llm.engine.phases import announce
from raydata_llm.engine.rank_line import (
    BATCH,
    BITMASK,
    FAILURE,
    GUIDED_BATCH,
    HEARTBEAT,
    LOADED,
    PHASE,
    READY,
    RESULT,
    SETTINGS,
    START,
    Line,
    LineAddress,
    LineListener,
    RankError,
)
from raydata_llm.engine.sampler import SampledLogprobs
from raydata_llm.engine.sequence import IntArray
from raydata_llm.engine.step_codec import BatchEncoder, decode_result, encode_bitmask

# A rank's heartbeat comes each second; a process that was stopped, or whose host is gone, sends none.
_SILENCE_SECONDS = 12.0
# Steps are under way, and in this time no rank ended one or, on a CPU, did any work.
_STANDSTILL_SECONDS = 15.0
# CPU seconds that count as work, over all ranks.
_WORK_SECONDS = 1.0
# When one rank fails, its neighbours do as well: how long the others' words are waited for.
_LAST_WORDS_SECONDS = 1.0
_CONNECT_SECONDS = 180.0


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


@dataclass
class _Rank:
    handle: RankHandle
    line: Line | None = None
    last_sign: float = field(default_factory=time.monotonic)
    num_steps: int = 0
    cpu: float = 0.0
    stack: str | None = None
    last_words: str | None = None
    is_gone: bool = False


class RemoteStep:
    """A step under way on the ranks."""

    def __init__(self, gang: RankGang, batch: ScheduledBatch) -> None:
        self._gang, self._batch = gang, batch

    def read(self) -> tuple[IntArray, SampledLogprobs | None]:
        """As `LaunchedStep.read`."""
        tokens, logprobs, pieces = self._gang.result(self._batch)
        for piece in pieces:
            piece.deliver()
        return tokens, logprobs


class RankGang:
    """Starts the ranks and loads the model; takes the place of a worker.

    Args:
        config: The engine's; its sizes say how many ranks.
        launcher: Starts them.
        vocab_size: The model's.

    Raises:
        ValueError: for settings that the ranks cannot meet.
        RankError: when one ends.
    """

    def __init__(self, config: EngineConfig, launcher: RankLauncher, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
        self._changed = threading.Condition()
        self._told: dict[bytes, list[Any]] = {LOADED: [], READY: [], RESULT: []}
        self._error: Exception | None = None
        self._ended = False
        self._encoder = BatchEncoder()
        self._num_launched = self._num_results = 0
        self._moved_at = time.monotonic()
        self._work = 0.0
        host = launcher.host
        # The engine keeps the meeting place: its port is the system's choice, and known before a rank starts.
        self._store = TCPStore(host or "127.0.0.1", 0, is_master=True, wait_for_workers=False)
        listener = LineListener(host)
        announce(f"starting {self._num_ranks} ranks")
        self._ranks = [_Rank(handle) for handle in launcher.launch(listener.address, self._num_ranks)]
        try:
            self._connect(listener)
            threading.Thread(target=self._watch, name="rank watch", daemon=True).start()
            self._load(config, (host or "127.0.0.1", self._store.port))
        except BaseException:
            self.shutdown()
            raise
        finally:
            listener.close()

    def start(self, num_blocks: int) -> None:
        """Have the ranks take memory for KV, and warm up."""
        self._send_all(START, json.dumps(num_blocks).encode())
        self._await(READY, self._num_ranks)

    def launch(self, batch: ScheduledBatch, bitmask: Callable[[], Bitmask | None] | None = None) -> RemoteStep:
        """Start a step on all ranks; the bitmask follows while they compute."""
        with self._changed:
            if self._num_launched == self._num_results:
                self._moved_at = time.monotonic()
            self._num_launched += 1
        self._send_all(GUIDED_BATCH if bitmask else BATCH, self._encoder.encode(batch))
        if bitmask is not None:
            self._send_all(BITMASK, encode_bitmask(bitmask()))
        return RemoteStep(self, batch)

    def result(self, batch: ScheduledBatch) -> tuple[IntArray, SampledLogprobs | None, list[PromptPiece]]:
        """The oldest step's result, which is `batch`'s."""
        self._await(RESULT, 1)
        with self._changed:
            data = self._told[RESULT].pop(0)
        return decode_result(data, batch, self._vocab_size)

    def shutdown(self) -> None:
        """End all ranks."""
        with self._changed:
            self._ended = True
        for rank in self._ranks:
            rank.handle.end()
        for rank in self._ranks:
            if rank.line is not None:
                rank.line.connection.close()

    # Start

    def _connect(self, listener: LineListener) -> None:
        """Take the ranks' calls, while looking whether one ends before it calls."""
        failed: list[Exception] = []

        def accept() -> None:
            try:
                for _ in self._ranks:
                    number, line = listener.accept()
                    self._ranks[number].line = line
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=accept, name="rank calls", daemon=True)
        thread.start()
        deadline = time.monotonic() + _CONNECT_SECONDS
        while thread.is_alive():
            thread.join(0.2)
            for number, rank in enumerate(self._ranks):
                fate = rank.handle.fate()
                if fate is not None:
                    raise RankError(f"rank {number} of {self._num_ranks} ended before it was there: {fate}")
            if time.monotonic() > deadline:
                missing = [number for number, rank in enumerate(self._ranks) if rank.line is None]
                raise RankError(f"ranks {missing} of {self._num_ranks} were not there after {_CONNECT_SECONDS:g} s")
        if failed:
            raise RankError(f"a rank could not be connected: {failed[0]}") from failed[0]

    def _load(self, config: EngineConfig, store: tuple[str, int]) -> None:
        fields = dataclasses.asdict(config)
        now = time.monotonic()
        for number, rank in enumerate(self._ranks):
            rank.last_sign = now
            assert rank.line is not None
            rank.line.send_json(SETTINGS, {"rank": number, "config": fields, "store": store})
        loaded = self._await(LOADED, self._num_ranks)
        self.sizes = Sizes(**loaded[0]["sizes"])
        self.device_type = str(loaded[0]["device"])
        self._on_cpu = self.device_type == "cpu"
        self._num_blocks = min(one["num_blocks"] for one in loaded)

    def num_kv_blocks(self) -> int:
        """Blocks that the rank with the least room has room for."""
        return int(self._num_blocks)

    # Talk

    def _send_all(self, kind: bytes, content: bytes) -> None:
        for rank in self._ranks:
            self._raise_error()
            assert rank.line is not None
            try:
                rank.line.send(kind, content)
            except OSError:
                self._await_error()

    def _await(self, kind: bytes, count: int) -> list[Any]:
        """Wait until that many ranks said so."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._told[kind]) >= count)
        self._raise_error()
        return self._told[kind]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _await_error(self) -> None:
        """A line is broken: the watch is about to say why."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, timeout=_SILENCE_SECONDS)
        self._raise_error()
        raise RankError("a rank's line is broken")

    # Watch

    def _watch(self) -> None:
        while not self._ended:
            try:
                self._take_frames(1.0)
                suspect = self._suspect()
            except OSError:
                # The lines were closed by `shutdown`.
                if self._ended:
                    return
                raise
            if suspect is not None:
                self._fail(suspect)
                return

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
            self._take(rank, kind, content)

    def _take(self, rank: _Rank, kind: bytes, content: bytes) -> None:
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
                self._told[kind].append(content if kind == RESULT else json.loads(content or b"null"))
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
                return f"rank {number} of {self._num_ranks} failed"
            if now - rank.last_sign > _SILENCE_SECONDS:
                silent = f"rank {number} of {self._num_ranks} hangs: no sign of life for {now - rank.last_sign:.0f} s"
                return f"{silent}, so no traceback either (its process is stopped, or its host is gone)"
        if self._num_launched > self._num_results and self._stands_still(now):
            return f"the ranks hang: no step ended for {now - self._moved_at:.0f} s"
        return None

    def _stands_still(self, now: float) -> bool:
        work = sum(rank.cpu for rank in self._ranks)
        if self._on_cpu and work > self._work + _WORK_SECONDS:
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

    def _fate(self, number: int, rank: _Rank) -> tuple[int, str] | None:
        fate = rank.handle.fate()
        if rank.last_words is not None:
            is_echo = any(word in rank.last_words for word in ("DistBackendError", "gloo", "Connection closed", "NCCL"))
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


LauncherFactory = Callable[[EngineConfig], RankLauncher]
