"""Frames between an engine and its ranks: who may call, and what comes of a line that breaks or is not understood."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import pytest

from raydata_llm.engine import rank_gang
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.rank_gang import RankGang
from raydata_llm.engine.rank_line import HEARTBEAT, Line, LineAddress, LineListener, RankError

HOSTS = pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["one host", "over TCP"])


@contextmanager
def listening(host: str | None) -> Iterator[LineListener]:
    listener = LineListener(host)
    try:
        yield listener
    finally:
        listener.close()


def dialled(listener: LineListener, rank: int = 3) -> tuple[Line, Line]:
    """Both ends: the rank's and the engine's."""
    mine: list[Line] = []
    caller = threading.Thread(target=lambda: mine.append(listener.address.dial(rank)))
    caller.start()
    number, line = listener.accept()
    caller.join()
    assert number == rank
    return mine[0], line


@HOSTS
def test_frames_of_threads_that_send_at_once_stay_whole(host: str | None) -> None:
    with listening(host) as listener:
        rank, engine = dialled(listener)
        sizes = [0, 1, 17_000, 300_000]

        def send(byte: int) -> None:
            for size in sizes * 5:
                rank.send(bytes([byte]), bytes([byte]) * size)

        threads = [threading.Thread(target=send, args=(byte,)) for byte in (65, 66, 67)]
        for thread in threads:
            thread.start()
        frames = [engine.receive() for _ in range(3 * 5 * len(sizes))]
        for thread in threads:
            thread.join()
        assert all(set(content) <= set(kind) for kind, content in frames)
        for kind in (b"A", b"B", b"C"):
            assert [len(content) for own, content in frames if own == kind] == sizes * 5


@HOSTS
def test_the_end_of_a_line_is_an_eof(host: str | None) -> None:
    with listening(host) as listener:
        rank, engine = dialled(listener)
        rank.connection.close()
        with pytest.raises((EOFError, OSError)):
            engine.receive()


def test_a_frame_that_is_cut_off_is_an_error_not_a_frame() -> None:
    with listening(None) as listener:
        rank, engine = dialled(listener)
        # A length of 100 bytes, and only 3 of them.
        with socket.socket(fileno=os.dup(rank.connection.fileno())) as end:
            end.sendall((100).to_bytes(4, "big") + b"abc")
        rank.connection.close()
        with pytest.raises((EOFError, OSError)):
            engine.receive()


@HOSTS
def test_strangers_are_refused_and_ranks_taken_all_the_same(host: str | None) -> None:
    with listening(host) as listener:
        where = listener.address.address
        failed: list[BaseException] = []

        def call() -> None:
            # One that hangs up at once, as a port scanner does, then one with another key.
            socket_of = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
            with socket.socket(socket_of) as end:
                end.connect(where)
            try:
                dataclasses.replace(listener.address, key="00" * 24).dial(0)
            except AuthenticationError as error:
                failed.append(error)
            rank.append(listener.address.dial(5))

        rank: list[Line] = []
        caller = threading.Thread(target=call)
        caller.start()
        number, _ = listener.accept()
        caller.join()
        assert number == 5 and rank and failed


def test_listeners_of_one_host_never_have_one_address() -> None:
    listeners = [LineListener(host) for host in (None, "127.0.0.1") * 4]
    assert len({str(listener.address.address) for listener in listeners}) == len(listeners)
    assert len({listener.address.key for listener in listeners}) == len(listeners)
    for listener in listeners:
        listener.close()


class Strangers:
    """Starts a thread in place of a rank, which does as told."""

    host = None

    def __init__(self, behaviour: Callable[[LineAddress], Any]) -> None:
        self._behaviour = behaviour

    def launch(self, address: LineAddress, num_ranks: int) -> list[Any]:
        for _ in range(num_ranks):
            threading.Thread(target=self._behaviour, args=(address,), daemon=True).start()
        return [self] * num_ranks

    def end(self) -> None:
        """There is nothing to kill."""

    def fate(self) -> str | None:
        """A thread that goes on."""
        return None


def gibberish(address: LineAddress) -> None:
    line = address.dial(0)
    line.send(b"?", b"what is this")
    time.sleep(60)


def broken_heartbeat(address: LineAddress) -> None:
    line = address.dial(0)
    line.send(HEARTBEAT, b"{not json")
    time.sleep(60)


def a_rank_too_many(address: LineAddress) -> None:
    address.dial(7)
    time.sleep(60)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (gibberish, "(?s)rank 0 .*frame.*b'\\?'"),
        (broken_heartbeat, "(?s)rank 0 .*frame.*b'H'"),
        (a_rank_too_many, "rank 7"),
        (lambda address: None, r"ranks \[0\] of 1 were not there after 2 s"),
    ],
    ids=["an unknown kind", "a heartbeat that is no JSON", "a number out of range", "no call"],
)
def test_what_is_not_understood_ends_the_engine_with_what_it_was(
    behaviour: Callable[[LineAddress], Any], said: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_gang, "_CONNECT_SECONDS", 2.0)
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu")
    began = time.monotonic()
    with pytest.raises(RankError, match=said):
        RankGang(config, Strangers(behaviour))
    assert time.monotonic() - began < 30
