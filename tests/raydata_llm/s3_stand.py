"""An S3 server (moto) in this process whose failures a test decides."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
SECRET = "canary-secret-7d1f"

# What a request meets instead of its answer: None, "slow down" or "cut".
Fault = Callable[[str, str], str | None]
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class S3Stand:
    """The server; set `fault` to a function of method and path to make requests fail."""

    def __init__(self) -> None:
        self.fault: Fault = lambda method, path: None
        self.faults = 0
        self.ranges: list[tuple[str, str]] = []
        app = DomainDispatcherApplication(create_backend_app)
        handler = type("Handler", (_Handler,), {"stand": self})
        self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key=SECRET,
        )
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def environment(self) -> dict[str, str]:
        """What leads a driver and its workers here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def keys(self, prefix: str) -> list[str]:
        """The objects under a prefix."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [entry["Key"] for entry in found]

    def bytes_read(self, key: str) -> int:
        """Bytes of an object that were asked for by range, as pyarrow reads."""
        ranges = [asked.removeprefix("bytes=").split("-") for path, asked in self.ranges if path.endswith(f"/{key}")]
        return sum(int(last) - int(first) + 1 for first, last in ranges)

    def uploads(self) -> list[str]:
        """The keys of unfinished uploads."""
        return [upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def close(self) -> None:
        self._server.shutdown()


class _Handler(WSGIRequestHandler):
    """Lets moto answer, or not."""

    stand: S3Stand

    def run_wsgi(self) -> None:
        if self.command == "GET" and "Range" in self.headers:
            self.stand.ranges.append((self.path.partition("?")[0], self.headers["Range"]))
        fault = self.stand.fault(self.command, self.path)
        if fault is None:
            super().run_wsgi()
            return
        self.stand.faults += 1
        self.close_connection = True
        if fault == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(503, "Slow Down")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(_SLOW_DOWN)))
        self.end_headers()
        self.wfile.write(_SLOW_DOWN)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextmanager
def s3_stand() -> Iterator[S3Stand]:
    """A server, to which this process's own AWS variables lead while it is there."""
    stand = S3Stand()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stand.environment.items():
            patch.setenv(name, value)
        try:
            yield stand
        finally:
            stand.close()
