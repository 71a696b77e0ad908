"""A web server that plays the part of the Hugging Face hub that takes commits: repositories are
made, a card is checked, files come in the commit or, as large ones do, by an upload of their own.

Its client is the real one, which `HF_ENDPOINT` leads here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_LARGE = (".safetensors",)


class HubThatTakes:
    """`repos` maps a repository to its files, `private` to whether it was made private; `tokens`
    are those that were shown. `refusal` is a status with which the creation is answered.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.refusal: int | None = None
        self._stored: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                hub._answer(self)

            do_PUT = do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubThatTakes:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        raw = _body(request)
        path = request.path.partition("?")[0]
        if path.startswith("/store/"):
            self._stored[path.rpartition("/")[2]] = raw
            _send(request, 200, {})
            return
        self.tokens.add(request.headers.get("Authorization", ""))
        status, answer = self._of(path, raw)
        _send(request, status, answer)

    def _of(self, path: str, raw: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(json.loads(raw))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        parts = path.split("/")
        if "/preupload/" in path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(raw)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(raw)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{self.endpoint}/store/{one['oid']}"}}}
                    for one in objects
                ],
            }
        if "/commit/" in path:
            return self._commit("/".join(parts[3:5]), raw)
        return 404, {"error": path}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if self.refusal is not None:
            return self.refusal, {"error": "no"}
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.repos:
            return 409, {"url": f"{self.endpoint}/{name}", "error": "exists"}
        self.repos[name] = {}
        self.private[name] = asked.get("private", asked.get("visibility") == "private")
        return 200, {"url": f"{self.endpoint}/{name}"}

    def _commit(self, repo: str, raw: bytes) -> tuple[int, Any]:
        for line in map(json.loads, raw.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                data = self._stored[value["oid"]]
                assert (hashlib.sha256(data).hexdigest(), len(data)) == (value["oid"], value["size"])
                self.repos[repo][value["path"]] = data
        oid = f"{len(self.messages):040}"
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True}


def _body(request: BaseHTTPRequestHandler) -> bytes:
    """What was sent, also in chunks, as the client sends large files."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


def _send(request: BaseHTTPRequestHandler, status: int, answer: Any) -> None:
    raw = json.dumps(answer).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(raw)))
    request.end_headers()
    request.wfile.write(raw)
