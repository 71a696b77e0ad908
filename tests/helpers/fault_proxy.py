"""A proxy between client and S3 server that spoils chosen answers:

no answer    the server has done the request, the connection is closed without a byte
reset        the request is not passed on, the connection is reset
503          the request is not passed on, the answer is an S3 error
truncated    the answer breaks off after half of its body
flipped      one bit of the answer's body is another, at the same place each time
elsewhere    one bit of the answer's body is another, at another place each time
spoiled      one bit of the request's body is another when it reaches the server
slow         the server has done the request, the answer comes `slow_s` later
silent       the request is not passed on, and nothing comes until the client leaves
twice        the server gets the request two times, and the answer is that to the second
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, less their whole parts, come nowhere near each other


class Fault(NamedTuple):
    """What happens to the next request of this method whose path holds `path`."""

    kind: str
    method: str
    path: str


class FaultProxy:
    """Listens on loopback and passes everything on to `endpoint`; a context manager."""

    # of the answers to GET, one in so many has a bit changed, at another place each time; 0: none
    flips_one_in = 0

    def __init__(self, endpoint: str, *, slow_s: float = 3.0) -> None:
        self.faults: list[Fault] = []
        self.struck: list[Fault] = []
        self.outage: str | None = None  # happens to every request while it is set
        self.slow_s = slow_s
        self.upstream = urlsplit(endpoint).netloc
        self.flipped = 0  # bits so far
        self._gets = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that left
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def passes(self, method: str, path: str, headers: Message) -> None:
        """Hears of every request before anything happens to it."""

    def take(self, method: str, path: str) -> str | None:
        with self._lock:
            if self.outage is not None:
                self.struck.append(Fault(self.outage, method, path))
                return self.outage
            for fault in self.faults:
                if fault.method == method and fault.path in path:
                    self.faults.remove(fault)
                    self.struck.append(fault)
                    return fault.kind
            if method == "GET":
                self._gets += 1
                if self.flips_one_in and self._gets % self.flips_one_in == 0:
                    return "elsewhere"
        return None

    def flip(self, body: bytes) -> bytes:
        """The body with another bit changed than the one before; all places have their turn."""
        with self._lock:
            self.flipped += 1
            bit = int(self.flipped * _GOLDEN * 8 * len(body)) % (8 * len(body) or 1)
        return with_one_bit_changed(body, bit // 8, 1 << bit % 8)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.passes(self.command, self.path, self.headers)
        fault = self.owner.take(self.command, self.path)
        if fault == "reset":
            self._break_off(reset=True)
            return
        if fault == "silent":
            self.rfile.read(1)
            self.close_connection = True
            return
        if fault == "503":
            self._answer(
                503,
                {},
                b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
            )
            return
        if fault == "twice":
            self._ask(body)
        status, headers, answer = self._ask(with_one_bit_changed(body) if fault == "spoiled" else body)
        if fault == "slow":
            time.sleep(self.owner.slow_s)
        if fault == "no answer":
            self._break_off()
        elif fault == "truncated":
            self._answer(status, headers, answer, sent=len(answer) // 2)
            self._break_off()
        elif fault == "elsewhere":
            self._answer(status, headers, self.owner.flip(answer))
        else:
            self._answer(status, headers, with_one_bit_changed(answer) if fault == "flipped" else answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = next(
            (value for name, value in headers.items() if name.lower() == "content-length"), str(len(body))
        )
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])

    def _break_off(self, *, reset: bool = False) -> None:
        self.close_connection = True
        with suppress(OSError):
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests say what they expect."""


def with_one_bit_changed(body: bytes, at: int | None = None, bit: int = 0x80) -> bytes:
    """The highest bit of the byte in the middle, after which no text is UTF-8, where nothing else
    is said.
    """
    at = len(body) // 2 if at is None else at
    return body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :] if body else body
