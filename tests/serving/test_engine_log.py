"""The engine's log lies in the cache, and the cache may be deleted while a server runs."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import httpx
import pytest

from adapterhub.errors import EngineError
from adapterhub.serving.engine.engine import Engine, Launch

# Answers every GET with 200, and ends by itself when it is told to.
SERVER = """
import http.server, os, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.do_GET()
        print("the last words", flush=True)
        threading.Timer(0.01, os._exit, [0]).start()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_outlives_its_log(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = Launch(
        command=(sys.executable, "-c", SERVER, str(port)),
        environment=os.environ,
        host="127.0.0.1",
        port=port,
        log=tmp_path / "cache" / "logs" / "serve.log",
    )
    with Engine(launch) as engine:
        shutil.rmtree(tmp_path / "cache")
        assert httpx.get(f"{engine.url}/ready", trust_env=False).status_code == 200
        httpx.post(f"{engine.url}/end", trust_env=False)
        with pytest.raises(EngineError, match=r"(?s)ended by itself.*the last words"):
            engine.wait()
        assert engine.processes() == []
