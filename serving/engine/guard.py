"""The guard between `ah serve` and the engine: no way to end one leaves a process of the other behind.

    ah serve ──pipe──► guard (own session) ──► API server ──► engine core ──► worker

`engine.py` starts this file as a program. It starts the engine in its own session and waits for either end:

- the engine ends: whatever it left in the session is killed, and the guard exits with the engine's code;
- the pipe says drain: SIGUSR1 to the engine, which takes no new requests, finishes those that run, and ends;
- the pipe says stop, or closes because `ah serve` is gone (SIGKILL included): SIGTERM to the engine, which stops its
  children; after the grace period SIGKILL to the whole session.

A pipe and not PR_SET_PDEATHSIG: that signal comes when the *thread* that started the child ends, and only to one
process. Standard library only: it lives beside the engine in 10 MB.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

DRAIN, STOP = b"d", b"s"  # what the pipe says


def main() -> None:
    """``guard.py PIPE_FD GRACE_SECONDS COMMAND…``. Exits with the command's code, 128 + n where signal n ended it."""
    pipe, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the pipe decides, also when a supervisor signals everybody
    wake, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    engine = subprocess.Popen(command)
    deadline: float | None = None
    while engine.poll() is None and (deadline is None or time.monotonic() < deadline):
        watched = [wake, pipe] if deadline is None else [wake]
        ready, _, _ = select.select(watched, [], [], deadline and max(0.0, deadline - time.monotonic()))
        if wake in ready:
            os.read(wake, 4096)
        if pipe in ready:
            if os.read(pipe, 1) == DRAIN:
                engine.send_signal(signal.SIGUSR1)
            else:
                deadline = time.monotonic() + grace
                engine.send_signal(signal.SIGTERM)
    end_session(os.getsid(0), spare=os.getpid())
    code = engine.wait()
    sys.exit(code if code >= 0 else 128 - code)


def end_session(session: int, *, spare: int = 0, patience: float = 5.0) -> None:
    """SIGKILL every process of a session but ``spare``; returns when they are gone, or after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (left := [pid for pid in session_processes(session) if pid != spare]) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def session_processes(session: int) -> list[int]:
    """The living processes of a session, zombies left out. Linux: from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _parent, _group, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it ended meanwhile
                continue
            if int(its_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main()
