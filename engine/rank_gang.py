"""An engine's ranks: started together, fed the same steps, and ended together as soon as one of them is gone.

Owns the engine's sending ends of the lines; `rank_watch.py` listens, `rank_store.py` is where the ranks meet. Knows no
requests; how processes are started is the launcher's matter. Takes the place of a worker.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.kv_budget import Sizes
from raydata_llm.engine.logprobs import PromptPiece
from raydata_llm.engine.phases import announce
from raydata_llm.engine.rank_launcher import RankLauncher
from raydata_llm.engine.rank_line import (
    BATCH,
    BITMASK,
    CALL,
    GUIDED_BATCH,
    LOADED,
    READY,
    SETTINGS,
    START,
    LineListener,
    RankError,
)
from raydata_llm.engine.rank_store_keeper import StoreKeeper
from raydata_llm.engine.rank_watch import RankWatch, WatchedRank
from raydata_llm.engine.sampler import SampledLogprobs
from raydata_llm.engine.sequence import IntArray
from raydata_llm.engine.step_codec import BatchEncoder, decode_result, encode_bitmask

_CONNECT_SECONDS = 180.0


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

    Raises:
        ValueError: for settings that the ranks cannot meet.
        RankError: when one ends.
    """

    def __init__(self, config: EngineConfig, launcher: RankLauncher) -> None:
        self._num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
        self._encoder = BatchEncoder()
        self._num_calls = 0
        listener = LineListener(launcher.host)
        # The ranks' other line has the same key, which so crosses no line itself.
        self._store = StoreKeeper(LineListener(launcher.host, listener.address.key))
        announce(f"starting {self._num_ranks} ranks")
        try:
            self._ranks = [WatchedRank(handle) for handle in launcher.launch(listener.address, self._num_ranks)]
        except BaseException:
            listener.close()
            self._store.close()
            raise
        self._watch = RankWatch(self._ranks)
        try:
            self._connect(listener)
            self._watch.start()
            self._load(config)
        except BaseException:
            self.shutdown()
            raise
        finally:
            listener.close()

    def start(self, num_blocks: int) -> None:
        """Have the ranks take memory for KV, and warm up."""
        self._send_all(START, json.dumps(num_blocks).encode())
        self._watch.wait_for(READY, self._num_ranks)

    def bucket_seconds(self) -> dict[int, float]:
        """None: the ranks keep them to themselves."""
        return {}

    def launch(self, batch: ScheduledBatch, bitmask: Callable[[], Bitmask | None] | None = None) -> RemoteStep:
        """Start a step on all ranks; the bitmask follows while they compute."""
        self._watch.step_launched()
        self._send_all(GUIDED_BATCH if bitmask else BATCH, self._encoder.encode(batch))
        if bitmask is not None:
            self._send_all(BITMASK, encode_bitmask(bitmask()))
        return RemoteStep(self, batch)

    def result(self, batch: ScheduledBatch) -> tuple[IntArray, SampledLogprobs | None, list[PromptPiece]]:
        """The oldest step's result, which is `batch`'s."""
        return decode_result(self._watch.next_result(), batch)

    def call(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        timeout: float | None,
        dumps: Callable[[Any], bytes],
    ) -> list[Any]:
        """As `Worker.call`, on every rank; their answers by rank.

        Args:
            timeout: Seconds; None waits as long as the ranks live.
            dumps: Pickles the function and its arguments. The ranks unpickle them: only their engine has their lines'
                key.

        Raises:
            TimeoutError: when they take longer.
        """
        self._num_calls += 1
        self._send_all(CALL, pickle.dumps(self._num_calls) + dumps((method, args, kwargs)))
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self._num_ranks:
            for content in self._watch.next_answers(1, timeout):
                number, rank, is_well, value = pickle.loads(content)
                if number == self._num_calls:
                    answers[rank] = (is_well, value)
        failed = [value for is_well, value in answers.values() if not is_well]
        if failed:
            raise failed[0]
        return [value for _, (_, value) in sorted(answers.items())]

    def shutdown(self) -> None:
        """End all ranks."""
        self._watch.end()
        for rank in self._ranks:
            rank.handle.end()
        for rank in self._ranks:
            if rank.line is not None:
                rank.line.connection.close()
        self._store.close()

    # Start

    def _connect(self, listener: LineListener) -> None:
        """Take the ranks' calls, while looking whether one ends before it calls."""
        failed: list[Exception] = []

        def accept() -> None:
            try:
                for _ in self._ranks:
                    number, line = listener.accept()
                    if not 0 <= number < self._num_ranks:
                        raise ValueError(f"rank {number} called, where {self._num_ranks} were started")
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

    def _load(self, config: EngineConfig) -> None:
        fields, store = dataclasses.asdict(config), self._store.address
        for number, rank in enumerate(self._ranks):
            assert rank.line is not None
            rank.line.send_json(SETTINGS, {"rank": number, "config": fields, "store": store})
        loaded = self._watch.wait_for(LOADED, self._num_ranks)
        self.sizes = Sizes(**loaded[0]["sizes"])
        self.device_type = str(loaded[0]["device"])
        self._watch.on_cpu = self.device_type == "cpu"
        self._num_blocks = min(one["num_blocks"] for one in loaded)

    def num_kv_blocks(self) -> int:
        """Blocks that the rank with the least room has room for."""
        return int(self._num_blocks)

    # Talk

    def _send_all(self, kind: bytes, content: bytes) -> None:
        for rank in self._ranks:
            self._watch.raise_error()
            assert rank.line is not None
            try:
                rank.line.send(kind, content)
            except OSError:
                self._watch.explain_broken_line()
