"""A program with the manners of an engine: children, a ready route, and every way to end. Run by test_engine.py.

fake_engine.py PORT [crash-at-start | ignores-sigterm | never-ready | busy]
Where the file BROKEN_IF_THERE is, it does not start.
"""

import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


REASONS = {"/die": b'{"reason": "its engine ended"}', "/hang": b'{"reason": "its engine hangs"}'}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global dead
        dead = dead or (self.path if self.path in REASONS else "")
        reason = REASONS.get(dead, b"") if self.path == "/health" else b""
        self.send_response(503 if manner == "never-ready" or reason else 200)
        self.send_header("content-length", str(len(reason)))
        self.end_headers()
        self.wfile.write(reason)
        if self.path == "/end":
            threading.Thread(target=server.shutdown).start()

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    allow_reuse_port = True
    daemon_threads = True


port, manner, dead = int(sys.argv[1]), sys.argv[2], ""
print("INFO 01-01 00:00:00 adapterhub.serving.rollout.rollout: following 3 adapters", flush=True)
print("(APIServer) INFO 01-01 00:00:00 [x.py:1] noise", flush=True)
if manner == "crash-at-start":
    print("(EngineCore) ERROR 01-01 00:00:00 [core.py:1] no memory for the cache", flush=True)
    sys.exit(0)  # vLLM, too, has ended with 0 after a crash
if manner == "ignores-sigterm":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if Path(os.environ.get("BROKEN_IF_THERE", "")).is_file():
    sys.exit(3)
signal.signal(signal.SIGUSR1, lambda *_: None if manner == "busy" else sys.exit(0))
subprocess.Popen([sys.executable, "-c", SLEEPER])  # outlives its parent unless somebody ends it
server = Server(("127.0.0.1", port), Handler)
server.serve_forever()
