"""`ah rollout … --url`, against a server that answers as the admin API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Ah = Callable[..., Any]
STATUS = {
    "channel": "acme/support@prod",
    "trial": {"phase": "running", "candidate": {"version": 4, "digest": "sha256:x", "weight": 5}},
    "ready": {"acme/support@3": 95, "acme/support@4": 5},
    "counts": {
        "3": {"requests": 90, "failed": 0, "first_byte_seconds": 0.1},
        "4": {"requests": 2, "failed": 1, "first_byte_seconds": None},
    },
    "score": 0.75,
    "problem": None,
}


class Admin(BaseHTTPRequestHandler):
    asked: list[tuple[str, Any]]
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked.append((self.path, body))
        said: Any = STATUS if self.status == 200 else {"error": {"message": "the model acme/x does not exist"}}
        raw = json.dumps(said).encode()
        self.send_response(self.status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def admin() -> Iterator[type[Admin]]:
    Admin.asked, Admin.status = [], 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Admin)
    Admin.url = f"http://127.0.0.1:{server.server_port}/v1"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Admin
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_start_sends_what_was_typed_and_shows_what_the_server_counts(ah: Ah, admin: Any) -> None:
    words = ("start", "acme/support", "prod", "4", "--weight", "5", "--min-score", "0.7", "--why", "new tone")
    done = ah("rollout", *words, "--url", admin.url)
    assert done.code == 0, done.err
    body = {"channel": "acme/support@prod", "why": "new tone", "candidate": "4", "weight": 5, "min_score": 0.7}
    assert admin.asked == [("/adapterhub/rollout/start", body)]
    assert "acme/support@prod → acme/support@3:95% acme/support@4:5%  rollout of 4 running" in done.out
    assert "version 4: 2 requests, 1 failed" in done.out and "scores 0.75" in done.out


@pytest.mark.parametrize("verb", ["promote", "pause", "abort", "status"])
def test_the_other_verbs(ah: Ah, admin: Any, verb: str) -> None:
    done = ah("rollout", verb, "acme/support", "prod", "--url", admin.url, "--json")
    assert done.json["score"] == 0.75
    assert admin.asked[0][0] == f"/adapterhub/rollout/{verb}"


def test_what_it_refuses(ah: Ah, admin: Any) -> None:
    for status, code in ((400, 2), (404, 2), (409, 2), (401, 2), (403, 2), (500, 1)):
        admin.status = status
        done = ah("rollout", "pause", "acme/x", "prod", "--url", admin.url)
        assert done.code == code, (status, done.err)
