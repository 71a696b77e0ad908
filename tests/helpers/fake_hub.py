"""A web server that plays the Hugging Face hub: models and data sets out of folders, and every way
in which a hub fails.

Its client is the real one, which `HF_ENDPOINT` leads here.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`models` and `datasets` map a name to its folder. `failure`: None, `silent` (takes requests
    and never answers), a status, `gated`, or `login` (a web page whatever is asked for); `only`
    the method that fails (None: all). `asked` has each request's method, path and range.
    """

    def __init__(self, models: dict[str, Path] | None = None) -> None:
        self.models = models or {}
        self.failure: str | int | None = None
        self.only: str | None = None
        self.asked: list[tuple[str, str, str]] = []
        self.released = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self)

            do_GET = do_HEAD

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.command, request.path, request.headers.get("Range", "")))
        failure = self.failure if self.only in (None, request.command) else None
        if failure == "silent":
            self.released.wait(60)
            return
        if failure == "gated":
            self._send(request, 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access"})
        elif failure == "login":
            self._send(request, 200, b"<!DOCTYPE html>log in", {"Content-Type": "text/html"})
        elif isinstance(failure, int):
            self._send(request, failure, b"{}", {})
        else:
            self._send_file(request)

    def _send_file(self, request: BaseHTTPRequestHandler) -> None:
        repo, found, name = request.path.lstrip("/").partition("/resolve/main/")
        if not found or repo not in self.models:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        path = self.models[repo] / name
        commit = {"X-Repo-Commit": COMMIT}
        if not path.is_file():
            self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound", **commit})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **commit}
        if (wanted := request.headers.get("Range")) is None:
            self._send(request, 200, content, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._send(request, 206, part, {"Content-Range": place, **headers})

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


def refusing_endpoint() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def use(monkeypatch: Any, address: str, cache: Path) -> None:
    """This process's client asks at `address` and keeps files in `cache`."""
    import huggingface_hub.constants as constants

    from emotion_train.edges import hub

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "_away", {})


def environment(address: str, cache: Path) -> dict[str, str]:
    """As `use`, for a process of its own."""
    return {"HF_ENDPOINT": address, "HF_HOME": str(cache)}


def describe(folder: Path) -> str:
    """The names of a folder's files as JSON, for a failing test's message."""
    return json.dumps(sorted(path.name for path in folder.iterdir()))
