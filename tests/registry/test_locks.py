"""One at a time, and nobody waits for the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterhub.errors import StorageError
from adapterhub.registry.locks import locked

HOLDER = """
import sys
from pathlib import Path
from adapterhub.registry.locks import locked
with locked(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_one_thread_is_inside_at_a_time(tmp_path: Path) -> None:
    inside = threading.Lock()

    def work(_: int) -> None:
        with locked(tmp_path / "folder" / "lock"):
            assert inside.acquire(blocking=False)
            inside.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_a_killed_process_held_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"inside\n"
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "lock"):
            entered.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not entered.is_set()
    holder.send_signal(signal.SIGKILL)
    waiter.join(timeout=30)
    assert entered.is_set()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), locked(tmp_path / "lock"):
        raise ValueError("mine")
    with locked(tmp_path / "lock"):
        pass


def test_a_place_that_cannot_be_locked_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be locked"), locked(tmp_path / "file" / "lock"):
        pass
