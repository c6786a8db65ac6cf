"""The line between an engine and one of its ranks: frames of bytes, a kind and a content.

Owns kinds and the making of both ends. Steps go as arrays (step_codec.py), everything rare as JSON. Names and ports
are the system's choice, so no two engines of a host collide, and who does not know the line's key is refused.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

# From the engine.
SETTINGS, START, BATCH, GUIDED_BATCH, BITMASK = b"S", b"K", b"B", b"G", b"M"
# From a rank.
JOINED, LOADED, READY, RESULT, HEARTBEAT, FAILURE, PHASE = b"J", b"L", b"R", b"T", b"H", b"E", b"P"


class RankError(RuntimeError):
    """A rank died or hung, and with it the engine."""


@dataclass(frozen=True)
class Line:
    """One end. Threads may send at once; one receives."""

    connection: Connection
    lock: threading.Lock

    def send(self, kind: bytes, content: bytes = b"") -> None:
        """Send a frame.

        Raises:
            OSError: when the other end is gone.
        """
        with self.lock:
            self.connection.send_bytes(kind + content)

    def send_json(self, kind: bytes, content: Any) -> None:
        """Send a frame of JSON."""
        self.send(kind, json.dumps(content).encode())

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame.

        Raises:
            EOFError, OSError: when the other end is gone.
        """
        frame = self.connection.recv_bytes()
        return frame[:1], frame[1:]


@dataclass(frozen=True)
class LineAddress:
    """Where a rank finds its engine: plain data.

    Args:
        address: A socket's path, or host and port.
        key: What both ends prove to know, in hex.
    """

    address: str | tuple[str, int]
    key: str

    def dial(self, rank: int) -> Line:
        """The rank's end."""
        address = self.address if isinstance(self.address, str) else (self.address[0], self.address[1])
        line = _line(Client(address, authkey=bytes.fromhex(self.key)))
        line.send_json(JOINED, rank)
        return line


class LineListener:
    """The engine's ear.

    Args:
        host: The name under which other hosts reach this one; None if all ranks are here.
    """

    def __init__(self, host: str | None) -> None:
        key = os.urandom(24)
        backlog = 64
        if host is None:
            self._listener = Listener(None, "AF_UNIX", backlog=backlog, authkey=key)
            self.address = LineAddress(str(self._listener.address), key.hex())
        else:
            self._listener = Listener(("", 0), "AF_INET", backlog=backlog, authkey=key)
            port = self._listener.address[1]
            assert isinstance(port, int)
            self.address = LineAddress((host, port), key.hex())

    def accept(self) -> tuple[int, Line]:
        """The next rank that calls, and its line.

        Others may call as well, such as those that look for open ports: they are hung up on.

        Raises:
            OSError: when it was closed.
        """
        while True:
            try:
                line = _line(self._listener.accept())
                _, content = line.receive()
            except (AuthenticationError, EOFError, ConnectionError):
                continue
            return int(json.loads(content)), line

    def close(self) -> None:
        """Take no more calls."""
        self._listener.close()


def _line(connection: Connection) -> Line:
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        if end.family != socket.AF_UNIX:
            # A frame is a short write after a long one at times: not to wait for the other end's word in between.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Line(connection, threading.Lock())
