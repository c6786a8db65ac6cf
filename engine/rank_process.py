"""What runs in a rank's process: it calls its engine, loads its shard, and runs the steps that it is sent.

Owns the process's three threads: the steps', one that sends results on when the device has them, and the heartbeat,
which says how long the present step has been going on and where it stands. Knows no requests and no queue. Invariant:
a rank never outlives its engine: where the line ends, so does the process.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from raydata_llm.engine.phases import PHASE_LOGGER
from raydata_llm.engine.rank_line import (
    BATCH,
    BITMASK,
    CALL,
    CALLED,
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
)
from raydata_llm.engine.redaction import mask_error, masked_logger, redact

_HEARTBEAT_SECONDS = 1.0
# A step that takes longer says where it is.
_TELLING_SECONDS = 3.0


def main() -> None:
    """A rank in a process of its own: who it is comes by standard input."""
    told = json.loads(sys.stdin.readline())
    code = 1
    try:
        serve(LineAddress.read(told["address"], told["key"]), told["rank"], told["gpu"])
        code = 0
    except BaseException:
        sys.stderr.write(redact(traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # NCCL's threads ask the store, which is Python, and would wait for an interpreter that takes itself apart.
        os._exit(code)


def serve(address: LineAddress, rank: int, gpu: int, find_model: Callable[[str], str] | None = None) -> None:
    """Be a rank until the engine ends.

    Args:
        gpu: Which of the GPUs that this process sees is its own, if it runs on one.
        find_model: Where the model lies here, by its load format, if not where it lies for the engine.
    """
    # Before torch is imported, which takes seconds: the engine sees from here on whether this process lives.
    line = address.dial(rank)
    process = _RankProcess(line)
    try:
        process.run(gpu, address.key, find_model)
    except (EOFError, ConnectionError):
        pass
    except BaseException as error:
        _tell_failure(line, error)
        masked = mask_error(error)
        raise masked from masked.__cause__
    finally:
        process.end()


class _RankProcess:
    def __init__(self, line: Line) -> None:
        self._line = line
        self._busy_since: float | None = None
        self._num_steps = 0
        self._main_thread = threading.get_ident()
        self._ended = threading.Event()
        self._launched: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def end(self) -> None:
        self._ended.set()
        self._launched.put(None)

    def run(self, gpu: int, key: str, find_model: Callable[[str], str] | None) -> None:
        worker = self._load(gpu, key, find_model)
        kind, content = self._line.receive()
        assert kind == START, kind
        worker.start(json.loads(content))
        self._line.send(READY)
        from raydata_llm.engine.step_codec import BatchDecoder

        threading.Thread(target=self._send_results, name="results", daemon=True).start()
        decoder = BatchDecoder()
        while True:
            kind, content = self._line.receive()
            if kind == CALL:
                self._line.send(CALLED, _answer(worker, content))
                continue
            assert kind in (BATCH, GUIDED_BATCH), kind
            self._busy_since = time.monotonic()
            batch = decoder.decode(content)
            launched = worker.launch(batch, self._receive_bitmask if kind == GUIDED_BATCH else None)
            if kind == GUIDED_BATCH and launched is None:
                # A stage that does not sample asks for none.
                self._receive_bitmask()
            if launched is not None and worker.is_speaker:
                self._launched.put(launched)
            self._num_steps += 1
            self._busy_since = None

    def _receive_bitmask(self) -> Any:
        from raydata_llm.engine.step_codec import decode_bitmask

        kind, content = self._line.receive()
        assert kind == BITMASK, kind
        return decode_bitmask(content)

    def _load(self, gpu: int, key: str, find_model: Callable[[str], str] | None) -> Any:
        kind, content = self._line.receive()
        assert kind == SETTINGS, kind
        told = json.loads(content)
        _relay_phases(self._line, told["rank"])
        if find_model is not None:
            told["config"]["model"] = find_model(told["config"]["load_format"])
        from raydata_llm.engine.rank_worker import load_worker

        worker = load_worker(told, gpu, key)
        sizes = dataclasses.asdict(worker.sizes)
        loaded = {"sizes": sizes, "num_blocks": worker.num_kv_blocks(), "device": worker.device.type}
        self._line.send_json(LOADED, loaded)
        return worker

    def _send_results(self) -> None:
        try:
            while (launched := self._launched.get()) is not None:
                self._line.send(RESULT, launched.read_encoded())
        except OSError:
            # The engine is gone; the line tells the main thread too.
            return
        except BaseException as error:
            _tell_failure(self._line, error)

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_SECONDS):
            since = self._busy_since
            busy = 0.0 if since is None else time.monotonic() - since
            stack = None
            if busy > _TELLING_SECONDS:
                frame = sys._current_frames().get(self._main_thread)
                stack = redact("".join(traceback.format_stack(frame))) if frame else None
            told = {"num_steps": self._num_steps, "busy": busy, "cpu": time.process_time(), "stack": stack}
            try:
                self._line.send_json(HEARTBEAT, told)
            except OSError:
                # The main thread may wait in a collective for a rank that is gone as well.
                os._exit(1)


def _answer(worker: Any, content: bytes) -> bytes:
    """Do what the engine calls for; what goes wrong in it is the caller's error, and the rank goes on."""
    stream = io.BytesIO(content)
    number = pickle.load(stream)
    try:
        method, args, kwargs = pickle.load(stream)
        return pickle.dumps((number, worker.rank, True, worker.call(method, args, kwargs)))
    except Exception as error:
        try:
            return pickle.dumps((number, worker.rank, False, error))
        except Exception:  # an error, too, may be of a kind that cannot be sent
            return pickle.dumps((number, worker.rank, False, RuntimeError(f"{type(error).__name__}: {error}")))


def _tell_failure(line: Line, error: BaseException) -> None:
    told = {
        "type": type(error).__name__,
        "message": redact(str(error)),
        "is_value_error": isinstance(error, ValueError),
        "traceback": redact("".join(traceback.format_exception(error))),
    }
    try:
        line.send_json(FAILURE, told)
    except OSError:
        masked_logger(__name__).exception("A rank failed, and its engine is gone")


def _relay_phases(line: Line, rank: int) -> None:
    """The first rank tells the engine what a long start is doing."""
    if rank != 0:
        return

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line.send(PHASE, record.getMessage().encode())

    logger = logging.getLogger(PHASE_LOGGER)
    logger.setLevel(logging.INFO)
    logger.addHandler(Relay())
