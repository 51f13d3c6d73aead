"""A small HTTP proxy in front of an S3 server that goes wrong when it is told to, and counts what it carries.

lose        carry the request out, then hang up without a reply
409 …       answer with this status and code, carry nothing out
truncate    hang up in the middle of the body
drip        a byte of the body, then nothing for as long as the client waits
hang        take the request, never answer
    garbage     answer something that is no S3
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CODES = {
    "409": (409, "ConditionalRequestConflict"),
    "412": (412, "PreconditionFailed"),
    "429": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "501": (501, "NotImplemented"),
    "503": (503, "SlowDown"),
    "507": (507, "XMinioStorageFull"),
    "301": (301, "PermanentRedirect"),
    "gone": (404, "NoSuchUpload"),
    "bucket": (404, "NoSuchBucket"),
    "denied": (403, "AccessDenied"),
    "key": (403, "InvalidAccessKeyId"),
    "secret": (403, "SignatureDoesNotMatch"),
    "skew": (403, "RequestTimeTooSkewed"),
    "region": (400, "AuthorizationHeaderMalformed"),
}


@dataclass
class Fault:
    """What goes wrong, with the next ``times`` requests of this method whose path and query hold ``where``."""

    kind: str
    method: str
    where: str = ""
    times: int = 1


@dataclass
class Proxy:
    """Told by tests what shall go wrong, and asked by them what went by."""

    target: str  # "127.0.0.1:5000"
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "PUT /bucket/key"
    sent: int = 0  # bytes of bodies that clients sent
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def breaks(self, kind: str, method: str, where: str = "", *, times: int = 1) -> None:
        self.faults.append(Fault(kind, method, where, times))

    def count(self, method: str, where: str = "") -> int:
        return sum(line.startswith(method + " ") and where in line for line in self.requests)

    def take(self, method: str, path: str, size: int) -> str:
        """Note a request; the kind of fault that it meets, empty for none."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            self.sent += size
            for fault in self.faults:
                if fault.times and fault.method == method and fault.where in path:
                    fault.times -= 1
                    return fault.kind
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.proxy.take(self.command, self.path, len(body))
        if kind == "hang":
            self.proxy.over.wait(60)
        elif kind in CODES:
            self._refuse(*CODES[kind])
            return
        elif kind == "garbage":
            self._answer(200, b"<html>Welcome!")
            return
        if kind != "hang":
            self._forward(body, kind)
        if kind:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - http.server's names

    def _refuse(self, status: int, code: str) -> None:
        where = "<Region>eu-west-1</Region>" if code == "AuthorizationHeaderMalformed" else ""
        body = f"<Error><Code>{code}</Code><Message>as the test wishes</Message>{where}</Error>".encode()
        self._answer(status, b"" if self.command == "HEAD" else body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _forward(self, body: bytes, kind: str) -> None:
        upstream = http.client.HTTPConnection(self.proxy.target)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            if kind == "lose":
                return
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self._give(content, kind)
        finally:
            upstream.close()

    def _give(self, content: bytes, kind: str) -> None:
        if kind == "truncate":
            content = content[: len(content) // 2]
        if kind == "drip":
            content = content[:1]
        try:
            self.wfile.write(content)
            self.wfile.flush()
            if kind == "drip":
                self.proxy.over.wait(60)
        except OSError:  # the client is gone
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        return  # clients hang up, as the tests want it


@contextmanager
def proxy_to(endpoint: str, *, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy in front of ``http://host:port``, with ``tls`` itself at ``https://``."""
    proxy = Proxy(urlsplit(endpoint).netloc)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
