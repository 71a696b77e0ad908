"""A web server that answers every HEAD and GET with an empty page: all the internet that a network
of one loopback has.

python -m tests.helpers.answering_server ADDRESS KEY_AND_CERTIFICATE.pem
"""

from __future__ import annotations

import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD


if __name__ == "__main__":
    server = ThreadingHTTPServer((sys.argv[1], 443), _Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
