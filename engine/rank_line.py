"""The line between an engine and one of its ranks: frames of bytes, a kind and a content.

Owns kinds and the making of both ends. Steps go as arrays (step_codec.py), everything rare as JSON. Names and ports
are the system's choice, so no two engines of a host collide. A listener is a socket file in a private folder, or a port
of this node's own address alone. Who does not know the line's key is refused, and delays nobody.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

# From the engine.
SETTINGS, START, BATCH, GUIDED_BATCH, BITMASK, CALL = b"S", b"K", b"B", b"G", b"M", b"C"
# From a rank.
JOINED, LOADED, READY, RESULT, HEARTBEAT, FAILURE, PHASE, CALLED = b"J", b"L", b"R", b"T", b"H", b"E", b"P", b"A"

# A caller proves that it knows the key within this time.
_PROOF_SECONDS = 20.0
# Callers that are proving it at once; more are hung up on.
_MOST_CALLERS = 64
# How often a listener looks whether it was closed.
_LOOK_SECONDS = 0.2
_BACKLOG = 128


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

    @classmethod
    def read(cls, address: str | Sequence[Any], key: str) -> LineAddress:
        """The address as it comes out of JSON."""
        return cls(address if isinstance(address, str) else (str(address[0]), int(address[1])), key)

    def dial(self, rank: int) -> Line:
        """The rank's end.

        Raises:
            OSError: when nobody listens there.
            AuthenticationError: for another key.
        """
        if isinstance(self.address, str):
            end = socket.socket(socket.AF_UNIX)
            end.connect(self.address)
        else:
            end = socket.create_connection((self.address[0], self.address[1]))
        connection, key = _connection(end), bytes.fromhex(self.key)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        line = Line(connection, threading.Lock())
        line.send_json(JOINED, rank)
        return line


class LineListener:
    """The engine's ear.

    Args:
        host: This node's address, under which other nodes reach it; None if all ranks are here.
        key: What callers must know, in hex; None makes one.
    """

    def __init__(self, host: str | None, key: str | None = None) -> None:
        self._key = os.urandom(24) if key is None else bytes.fromhex(key)
        self._folder: str | None = None
        if host is None:
            # A folder of mkdtemp is its user's alone.
            self._folder = tempfile.mkdtemp(prefix="raydata_llm-line-")
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(os.path.join(self._folder, "ranks"))
            self._socket.listen(_BACKLOG)
            self.address = LineAddress(str(self._socket.getsockname()), self._key.hex())
        else:
            self._socket = _own_port(host)
            self.address = LineAddress((host, int(self._socket.getsockname()[1])), self._key.hex())
        self._socket.settimeout(_LOOK_SECONDS)
        self._closed = threading.Event()
        self._room = threading.BoundedSemaphore(_MOST_CALLERS)
        self._ready: queue.SimpleQueue[tuple[int, Line] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="rank calls", daemon=True).start()

    def accept(self) -> tuple[int, Line]:
        """The next rank that calls, and its line.

        Others may call as well, such as those that look for open ports: they are hung up on.

        Raises:
            OSError: when it was closed.
        """
        called = self._ready.get()
        if called is None:
            self._ready.put(None)
            raise OSError(errno.EBADF, "the listener was closed")
        return called

    def close(self) -> None:
        """Take no more calls."""
        if not self._closed.is_set():
            self._closed.set()
            self._socket.close()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._ready.put(None)

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                end, _ = self._socket.accept()
            except (TimeoutError, ConnectionError):
                continue
            except OSError:
                # It was closed, or this process has no more files: callers try again or time out.
                self._closed.wait(_LOOK_SECONDS)
                continue
            if not self._room.acquire(blocking=False):
                end.close()
                continue
            # One that connects and says nothing must not keep the others waiting.
            threading.Thread(target=self._prove, args=(end,), name="rank call", daemon=True).start()

    def _prove(self, end: socket.socket) -> None:
        """Have a caller prove that it knows the key, and say who it is."""
        connection = _connection(end, _PROOF_SECONDS)
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            line = Line(connection, threading.Lock())
            _, content = line.receive()
            _set_patience(connection, 0.0)
            self._ready.put((int(json.loads(content)), line))
        except (AuthenticationError, EOFError, OSError, ValueError, TypeError):
            # `Connection` says of a frame with an impossible length that it is an OSError.
            connection.close()
        finally:
            self._room.release()


def _own_port(host: str) -> socket.socket:
    """A port of the system's choice at this node's own address.

    Where nodes are known by an address that is not their own (behind NAT) it is a port of all addresses: the key, not
    the address, is what keeps strangers out.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", 0), family=family, backlog=_BACKLOG)


def _connection(end: socket.socket, patience: float = 0.0) -> Connection:
    """A socket as a connection of frames."""
    end.setblocking(True)
    if end.family != socket.AF_UNIX:
        # A frame is a short write after a long one at times: not to wait for the other end's word in between.
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(end.detach())
    _set_patience(connection, patience)
    return connection


def _set_patience(connection: Connection, seconds: float) -> None:
    """After how many seconds without a byte a read or write fails; 0 waits for ever."""
    limit = struct.pack("@ll", int(seconds), 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
