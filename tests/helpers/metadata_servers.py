"""The metadata services of three clouds, as small servers on loopback that a test can make slow,
strange or silent.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

Reply = tuple[int, str] | None  # None: no answer until the server ends


@dataclass
class Machine:
    """What the service knows, and what it was asked. `odd` answers before the protocol does, where
    it returns something.
    """

    action: dict[str, str] | None = None  # AWS
    advice: dict[str, str] | None = None  # AWS
    token: str = "token-1"
    preempted: bool = False  # GCP
    name: str | None = "vm-0"  # Azure
    events: list[dict[str, object]] = field(default_factory=list)  # Azure
    odd: Callable[[str, str], Reply | tuple[()]] = lambda method, path: ()
    asked: list[str] = field(default_factory=list)
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    machine: Machine

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        self.machine.asked.append(f"{method} {self.path}")
        odd = self.machine.odd(method, self.path)
        reply = odd if odd is None or len(odd) == 2 else self.answer(method, urlsplit(self.path).path)
        if reply is None:
            self.machine.over.wait()
            self.close_connection = True
            return
        status, text = reply
        body = text.encode()
        self.send_response(status)
        for name, value in self.headers_of(text).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, method: str, path: str) -> Reply:
        raise NotImplementedError

    def headers_of(self, text: str) -> dict[str, str]:
        """What goes with this body."""
        return {}


class AwsHandler(_Handler):
    """IMDSv2: nothing without the token that a PUT gave."""

    def answer(self, method: str, path: str) -> Reply:
        if method == "PUT":
            known = path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            return (200, self.machine.token) if known else (400, "")
        if self.headers.get("X-aws-ec2-metadata-token") != self.machine.token:
            return 401, ""
        found = {
            "/latest/meta-data/spot/instance-action": self.machine.action,
            "/latest/meta-data/events/recommendations/rebalance": self.machine.advice,
        }.get(path)
        return (404, "") if found is None else (200, json.dumps(found))


class GcpHandler(_Handler):
    """Values with an ETag; `wait_for_change` hangs until the value is another one than that of
    `last_etag`.
    """

    _etags: ClassVar[dict[str, str]] = {"FALSE": "e0", "TRUE": "e1"}

    def answer(self, method: str, path: str) -> Reply:
        if self.headers.get("Metadata-Flavor") != "Google":
            return 403, ""
        if path == "/computeMetadata/v1/instance/id":
            return 200, "4711"
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, ""
        query = parse_qs(urlsplit(self.path).query)
        end = time.monotonic() + float(query.get("timeout_sec", ["3600"])[0])
        while (
            "wait_for_change" in query
            and self._etags[self._value()] == query["last_etag"][0]
            and time.monotonic() < end
            and not self.machine.over.is_set()
        ):
            time.sleep(0.01)
        return 200, self._value()

    def headers_of(self, text: str) -> dict[str, str]:
        return {"Metadata-Flavor": "Google", "ETag": self._etags.get(text, "e")}

    def _value(self) -> str:
        return "TRUE" if self.machine.preempted else "FALSE"


class AzureHandler(_Handler):
    def answer(self, method: str, path: str) -> Reply:
        if self.headers.get("Metadata") != "true" or "api-version=" not in self.path:
            return 400, ""
        if path == "/metadata/instance/compute/name" and self.machine.name is not None:
            return 200, self.machine.name
        if path == "/metadata/scheduledevents":
            return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.machine.events})
        return 404, ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has hung up is no news."""


@contextmanager
def serving(handler: type[_Handler], **facts: object) -> Iterator[Machine]:
    """A machine whose metadata service listens at its `url`."""
    machine = Machine(**facts)  # type: ignore[arg-type]
    server = _Server(("127.0.0.1", 0), type("Handler", (handler,), {"machine": machine}))
    machine.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield machine
    finally:
        machine.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
