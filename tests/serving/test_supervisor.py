"""An engine that ends is started again, and its port is never silent; a small real program stands in its place."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from adapterhub.errors import EngineError
from adapterhub.serving.engine.engine import Engine, Launch
from adapterhub.serving.engine.standin import StandIn
from adapterhub.serving.engine.supervisor import STEADY_SECONDS, Supervisor, pause_after

pytestmark = pytest.mark.slow  # processes, seconds in all

PROGRAM = Path(__file__).with_name("fake_engine.py")
PATIENCE = 60  # seconds until a thread that must end is given up


class Run:
    """A supervised engine, and what was said of it. ``pauses`` are not waited."""

    def __init__(self, folder: Path, *, restarts: int = 3, manner: str = "well") -> None:
        self.broken = folder / "broken"
        self.said: list[str] = []
        self.pauses: list[float] = []
        self.during: Callable[[], None] = lambda: None  # done in each pause
        self.back: Callable[[], None] = lambda: None  # done when it is ready again
        self.clock: Callable[[], float] = lambda: 0.0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        plan = Launch(
            command=(sys.executable, str(PROGRAM), str(port), manner),
            environment=os.environ | {"BROKEN_IF_THERE": str(self.broken)},
            host="127.0.0.1",
            port=port,
            log=folder / "logs" / "engine.log",
        )
        self.engine = Engine(plan, say=self._say)
        self.supervisor = Supervisor(
            self.engine, restarts=restarts, say=self._say, clock=lambda: self.clock(), sleep=self._sleep
        )

    def _say(self, line: str) -> None:
        self.said.append(line)
        if line == "ready again":
            self.back()

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.during()

    def get(self, path: str = "/ready") -> httpx.Response:
        return httpx.get(f"{self.engine.url}{path}", trust_env=False)

    def kill(self) -> None:
        os.kill(self.engine.processes()[1], signal.SIGKILL)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_engine_that_was_killed_comes_back_and_meanwhile_clients_are_told_when_to_come_again(run: Run) -> None:
    answers: list[httpx.Response] = []

    def meanwhile() -> None:
        url = run.engine.url
        answers.append(httpx.post(f"{url}/v1/chat/completions", json={"model": "base"}, trust_env=False))
        answers.append(httpx.post(f"{url}/v1/messages", content=b"x" * 100_000, trust_env=False))
        answers.append(run.get("/ready"))

    def once_again() -> None:
        assert run.get().status_code == 200
        run.broken.touch()
        run.kill()

    run.during, run.back = meanwhile, once_again
    run.supervisor.start()
    run.kill()
    with pytest.raises(EngineError, match="given up"):
        run.supervisor.run()
    assert run.said.count("ready again") == 1
    assert {a.status_code for a in answers} == {503}
    assert {a.headers["retry-after"] for a in answers} == {"5"}
    assert "being started again" in answers[0].json()["error"]["message"]
    assert answers[1].json()["error"]["type"] == "overloaded_error"


def test_an_engine_that_cannot_be_kept_up_is_given_up_with_the_reason(run: Run) -> None:
    run.supervisor.start()
    run.broken.touch()
    run.kill()
    with pytest.raises(EngineError, match="ended 4 times in a row, and is given up") as error:
        run.supervisor.run()
    assert run.pauses == [1, 2, 4]
    assert "did not start (exit code 3)" in error.value.why
    assert "engine-4.log" in error.value.hint and (run.engine.log.parent / "engine.log").is_file()
    assert run.engine.processes() == []
    with pytest.raises(httpx.ConnectError):
        run.get()


def test_without_restarts_the_first_end_is_told_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path, restarts=0)
    run.supervisor.start()
    run.kill()
    with pytest.raises(EngineError, match="the engine ended by itself"):
        run.supervisor.run()
    assert run.pauses == []


def test_a_server_that_says_its_engine_is_dead_is_started_again_too(tmp_path: Path) -> None:
    run = Run(tmp_path, restarts=0)
    run.supervisor.start()
    run.get("/die")
    with pytest.raises(EngineError, match="the engine ended by itself"):
        run.supervisor.run()


def test_an_engine_that_was_steady_has_put_its_past_behind_it(tmp_path: Path) -> None:
    """With one restart in a row, it comes back as often as it was steady before."""
    run = Run(tmp_path, restarts=1)

    def end_again() -> None:
        if run.said.count("ready again") == 3:
            run.broken.touch()
        run.kill()

    run.back = end_again
    run.clock = iter(range(0, 10**6, int(STEADY_SECONDS))).__next__
    run.supervisor.start()
    run.kill()
    with pytest.raises(EngineError, match="ended 2 times in a row"):
        run.supervisor.run()
    assert run.said.count("ready again") == 3
    assert run.pauses == [1, 1, 1, 1]


@pytest.mark.parametrize(("ends", "seconds"), [(1, 1), (2, 2), (5, 16), (7, 60), (50, 60)])
def test_pauses_grow_and_end(ends: int, seconds: float) -> None:
    assert pause_after(ends) == seconds


class TestDraining:
    def test_an_engine_that_is_done_ends_by_itself(self, run: Run) -> None:
        run.supervisor.start()
        assert run.engine.drain(PATIENCE)
        run.engine.stop()
        assert run.engine.processes() == []

    def test_one_that_is_busy_is_ended_after_its_time(self, tmp_path: Path) -> None:
        run = Run(tmp_path, manner="busy")
        run.supervisor.start()
        assert not run.engine.drain(0.2)
        assert run.get().status_code == 200
        run.engine.stop()
        assert run.engine.processes() == []


def test_who_came_a_moment_before_the_stand_in_leaves_is_answered() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clients = []
    with StandIn("127.0.0.1", port, why="it is starting"):
        for _ in range(20):
            client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            clients.append(client)
    for client in clients:
        with client:
            assert client.recv(12) == b"HTTP/1.1 503"


def test_rubbish_harms_nobody() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with StandIn("127.0.0.1", port, why="it is starting"):
        for raw in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b""):
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
                client.sendall(raw)
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 503
