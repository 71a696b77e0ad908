"""HTTP and TLS servers on loopback that answer as an endpoint may that is not the S3 one hopes for.

A server takes a function from the request (its method and path) to what it answers; `certificate`
makes a CA and a server's certificate by the `openssl` of the machine.
"""

from __future__ import annotations

import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Endpoint(NamedTuple):
    """`seen` are the requests so far, as `GET /path`."""

    url: str
    seen: list[str]


def refusing(status: int, code: str) -> Callable[[str, str], Answer]:
    """As S3 refuses: the code is in the body, which a HEAD has not."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>m</Message></Error>'.encode()
    return lambda method, path: Answer(status, body, {"Content-Type": "application/xml"})


@contextmanager
def endpoint(
    answer: Callable[[str, str], Answer], *, context: ssl.SSLContext | None = None
) -> Iterator[Endpoint]:
    """A server of these answers; over TLS where a context is given."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(f"{self.command} {self.path}")
            status, body, headers = answer(self.command, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:  # a client that did not like the certificate
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        scheme = "http"
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            scheme = "https"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield Endpoint(f"{scheme}://127.0.0.1:{server.server_port}", seen)
        finally:
            server.shutdown()
            thread.join()


class Certificates(NamedTuple):
    """Files in PEM; the leaf's names 127.0.0.1, and `alone` signs itself for it."""

    ca: Path
    leaf: Path
    other_ca: Path
    alone: Path

    def context(self, *, alone: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.alone if alone else self.leaf)
        return context


def certificates(folder: Path) -> Certificates:
    def make(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    name = ("-addext", "subjectAltName=IP:127.0.0.1")
    for ca in ("ca", "other"):
        make("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN=test {ca}")
    make("req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=leaf", *name)
    signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2", "-copy_extensions", "copyall")
    make("x509", "-req", "-in", "leaf.csr", "-out", "leaf.crt", *signer)
    make("req", "-x509", *key, "-keyout", "alone.key", "-out", "alone.crt", "-subj", "/CN=alone", *name)
    for one in ("leaf", "alone"):
        both = (folder / f"{one}.crt").read_bytes() + (folder / f"{one}.key").read_bytes()
        (folder / f"{one}.both").write_bytes(both)
    return Certificates(*(folder / name for name in ("ca.pem", "leaf.both", "other.pem", "alone.both")))
