"""`ah loaded`, against a server that answers as the admin API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Ah = Callable[..., Any]
KEY = "ah_abcdefghijkl_" + "x" * 43


class Admin(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.headers["authorization"] == f"Bearer {KEY}" and self.path == "/adapterhub/loaded"
        body: Any = [{"model": "acme/support@3", "leases": 2, "pinned": True}]
        if not allowed:
            body = {"error": {"message": "an API key is needed"}}
        raw = json.dumps(body).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Admin)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_loaded(ah: Ah, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ah("loaded", "--url", url)
    assert refused.code == 2 and "AH_API_KEY" in refused.err
    monkeypatch.setenv("AH_API_KEY", KEY)
    assert ah("loaded", "--url", url, "--json").json == [{"model": "acme/support@3", "leases": 2, "pinned": True}]
    monkeypatch.setenv("AH_URL", url)
    assert "acme/support@3  2         yes" in ah("loaded").out


def test_no_server(ah: Ah) -> None:
    done = ah("loaded", "--url", "http://127.0.0.1:9/v1")
    assert done.code == 1 and "ah serve" in done.err
