"""Answers on the server's port while no engine does: 503, why, and when to come again.

    with StandIn(host, port, why="the engine is being started again"):
        …                                   # until the engine answers on the same port

Load balancers see a server that is not ready instead of one that refuses connections, and clients come again by
themselves: the ones of OpenAI and Anthropic heed ``Retry-After``.
"""

from __future__ import annotations

import select
import socket
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from adapterhub.errors import NotReady
from adapterhub.serving.answers import error_answer, error_headers
from adapterhub.serving.tenancy import MAX_BODY

_PATIENCE = 5.0  # seconds for a client to send its request
_CHUNK = 65536  # bytes


class StandIn:
    """A server of its own threads, which shares its port with the engine's: both are open for a moment."""

    def __init__(self, host: str, port: int, *, why: str) -> None:
        self._address = (host, port)
        self.why = why

    def __enter__(self) -> Self:
        """Raises OSError where somebody else has the port."""
        self._server = _Server(self._address, why=self.why)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="stand-in", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.answer_who_came()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    allow_reuse_port = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], *, why: str) -> None:
        self.why = why
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def answer_who_came(self) -> None:
        """Those whose connection waits already: the socket would break it off when it closes."""
        self.socket.setblocking(False)
        self.timeout = 0
        while self._has_one():
            self._handle_request_noblock()  # type: ignore[attr-defined]  # of socketserver.BaseServer

    def _has_one(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left, or sent nothing: none of the operator's business."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE

    def _answer(self) -> None:
        self._swallow()
        error = NotReady("the server is not ready", why=self.server.why)
        status, body = error_answer(error, path=self.path, request_id=uuid.uuid4().hex)
        self.close_connection = True
        self.send_response(status)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        for name, value in [*headers, *error_headers(error)]:
            self.send_header(name.decode(), value.decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Whatever the method."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _swallow(self) -> None:
        """A client that still sends when its connection is closed does not read the answer."""
        announced = self.headers.get("content-length", "0")
        left = min(int(announced), MAX_BODY) if announced.isdigit() else 0
        while left > 0 and (chunk := self.rfile.read(min(_CHUNK, left))):
            left -= len(chunk)

    def version_string(self) -> str:
        return "adapterhub"

    def log_message(self, format: str, *args: object) -> None:
        pass
