"""Starting, crashing and stopping, with a small real program in the engine's place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from adapterhub.errors import EngineError, MissingDependency, NotFound, UsageError
from adapterhub.serving.arguments import ServeOptions
from adapterhub.serving.engine import engine as engines
from adapterhub.serving.engine.engine import Engine, Launch, prepare
from adapterhub.serving.engine.guard import session_processes
from adapterhub.serving.engine.log import cause, telling

PROGRAM = Path(__file__).with_name("fake_engine.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(folder: Path, manner: str = "well") -> Launch:
    port = free_port()
    return Launch(
        command=(sys.executable, str(PROGRAM), str(port), manner),
        environment=dict(os.environ),
        host="127.0.0.1",
        port=port,
        log=folder / "logs" / "engine.log",
    )


def until(condition: Callable[[], object], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def running(tmp_path: Path, said: list[str]) -> Iterator[Engine]:
    with Engine(launch(tmp_path), say=said.append) as engine:
        yield engine


class TestStart:
    def test_it_is_ready_when_start_returns(self, running: Engine) -> None:
        assert httpx.get(f"{running.url}/ready").status_code == 200
        assert running.base_url == f"{running.url}/v1"

    def test_our_lines_are_told_and_the_noise_is_in_the_log(self, running: Engine, said: list[str]) -> None:
        assert "following 3 adapters" in said
        assert not [line for line in said if "noise" in line]
        assert "noise" in running.log.read_text()

    def test_an_end_before_it_is_ready_is_an_error_whatever_the_code(self, tmp_path: Path) -> None:
        engine = Engine(launch(tmp_path, "crash-at-start"))
        with pytest.raises(EngineError, match="did not start") as error:
            engine.start()
        assert error.value.exit_code == 1
        assert "no memory for the cache" in error.value.why
        assert str(engine.log) in error.value.hint
        assert engine.processes() == []

    def test_one_that_never_gets_ready_is_given_up_and_ended(self, tmp_path: Path) -> None:
        engine = Engine(launch(tmp_path, "never-ready"), start_seconds=1)
        with pytest.raises(EngineError, match="not ready within 1 s"):
            engine.start()
        assert engine.processes() == []


class TestStop:
    def test_nothing_is_left(self, tmp_path: Path) -> None:
        with Engine(launch(tmp_path)) as engine:
            processes = engine.processes()
            assert len(processes) == 3  # guard, engine, its child
        until(lambda: not alive(processes))
        with pytest.raises(httpx.ConnectError):
            httpx.get(engine.url)
        engine.stop()  # a second time is fine

    def test_one_that_ignores_sigterm_is_killed_after_the_grace(self, tmp_path: Path) -> None:
        with Engine(launch(tmp_path, "ignores-sigterm"), grace_seconds=0.2) as engine:
            processes = engine.processes()
        until(lambda: not alive(processes))


class TestEndByItself:
    @pytest.mark.parametrize("victim", ["engine", "guard"])
    def test_a_killed_process_is_a_crash_and_the_rest_goes_too(self, running: Engine, victim: str) -> None:
        guard, program, *_ = running.processes()
        processes = running.processes()
        os.kill(program if victim == "engine" else guard, signal.SIGKILL)
        with pytest.raises(EngineError, match="ended by itself"):
            running.wait()
        running.stop()
        until(lambda: not alive(processes))

    def test_a_clean_exit_nobody_asked_for_is_a_crash(self, running: Engine) -> None:
        httpx.get(f"{running.url}/end")
        with pytest.raises(EngineError, match=r"ended by itself \(exit code 0\)") as error:
            running.wait()
        assert error.value.exit_code == 1

    def test_one_that_answers_no_more_hangs(self, tmp_path: Path) -> None:
        plan = replace(launch(tmp_path), hang_seconds=0.3)
        with Engine(plan, grace_seconds=0.1) as engine:
            processes = engine.processes()
            os.kill(processes[1], signal.SIGSTOP)
            with pytest.raises(EngineError, match="the engine hangs: it has not answered for"):
                engine.wait()
        until(lambda: not alive(processes))

    def test_one_that_says_that_it_hangs_is_told_apart(self, running: Engine) -> None:
        httpx.get(f"{running.url}/hang")
        with pytest.raises(EngineError, match="it has not finished a step"):
            running.wait()

    def test_when_its_owner_is_killed_everything_ends(self, tmp_path: Path) -> None:
        """`ah serve` under SIGKILL: the guard sees the pipe close."""
        plan = launch(tmp_path)
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), *plan.command, str(plan.port)], stdout=subprocess.PIPE
        )
        assert owner.stdout is not None
        session = int(owner.stdout.readline())
        processes = session_processes(session)
        assert len(processes) == 3
        owner.kill()
        owner.wait()
        owner.stdout.close()
        until(lambda: not alive(processes))


OWNER = """
import os, sys, time
from pathlib import Path
from adapterhub.serving.engine.engine import Engine, Launch
folder, *command, port = sys.argv[1:]
plan = Launch(tuple(command), dict(os.environ), "127.0.0.1", int(port), Path(folder) / "engine.log")
engine = Engine(plan)
engine.start()
print(os.getsid(engine.processes()[0]), flush=True)
time.sleep(600)
"""


def alive(processes: list[int]) -> list[int]:
    """Those that run; a zombie does not."""
    found = []
    for pid in processes:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


class TestPrepare:
    def options(self, base: Path, tmp_path: Path, **changes: object) -> ServeOptions:
        values: dict[str, object] = {
            "base": str(base),
            "registry": (tmp_path / "registry").as_uri(),
            "cache": tmp_path / "cache",
            "port": 0,
        }
        return ServeOptions(**values | changes)  # type: ignore[arg-type]

    def test_a_free_port_is_found(self, tiny_base: Path, tmp_path: Path) -> None:
        plan = prepare(self.options(tiny_base, tmp_path))
        assert plan.port > 0
        assert str(plan.port) in plan.command
        assert plan.url == f"http://127.0.0.1:{plan.port}"
        assert plan.example == "base"

    def test_a_port_in_use_is_told_before_anything_loads(self, tiny_base: Path, tmp_path: Path) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use") as error:
                prepare(self.options(tiny_base, tmp_path, port=port))
        assert error.value.exit_code == 2
        assert f"--port {port + 1}" in error.value.hint

    def test_a_base_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="was not found"):
            prepare(self.options(tmp_path / "nothing", tmp_path))

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
    def test_an_address_that_others_reach_needs_keys(self, tiny_base: Path, tmp_path: Path, host: str) -> None:
        with pytest.raises(UsageError, match="needs API keys"):
            prepare(self.options(tiny_base, tmp_path, host=host))

    def test_owned_flags_are_refused(self, tiny_base: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--api-key cannot be passed"):
            prepare(self.options(tiny_base, tmp_path, vllm_args=("--api-key", "x")))

    def test_without_vllm_the_command_to_type(
        self, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "vllm", raising=False)  # another test may have imported it
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(MissingDependency, match="vLLM is not installed") as error:
            prepare(self.options(tiny_base, tmp_path))
        assert "pip install 'adapterhub[serve" in error.value.hint

    def test_elsewhere_than_linux(self, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(MissingDependency, match="serving needs Linux"):
            prepare(self.options(tiny_base, tmp_path))

    def test_what_the_registry_holds_decides_the_rank(
        self, tiny_base: Path, tmp_path: Path, adapter_factory: Callable[..., Path]
    ) -> None:
        from adapterhub.base import find_base
        from adapterhub.refs import AdapterName
        from adapterhub.registry import draft, open_registry

        options = self.options(tiny_base, tmp_path)
        registry, base = open_registry(options.registry), find_base(str(tiny_base))
        for rank in (4, 24):
            folder = adapter_factory(f"r{rank}", rank=rank)
            registry.publish(draft(folder, base=base), name=AdapterName.parse("acme/support"), author="tests")
        plan = prepare(options)
        pairs = dict(pairwise(plan.command))
        assert pairs["--max-lora-rank"] == "32"
        assert plan.example == "acme/support@2"
        assert "max-lora-rank 32" in plan.notes[0]
        assert any("no API keys" in note for note in plan.notes)
        assert plan.prefetch is not None
        with plan.prefetch as prefetch:
            prefetch.wait(60)
        assert prefetch.count == 1, "the newest, which is what its name means"


class TestBytecode:
    def test_kept_where_the_installation_kept_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "vllm"
        package.mkdir()
        (package / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, "vllm", raising=False)  # another test may have imported it
        monkeypatch.syspath_prepend(tmp_path)
        environ = {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tmp_path)}
        kept = engines._keeping_bytecode(environ)
        assert kept == {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPYCACHEPREFIX": f"{tmp_path}/adapterhub/bytecode"}
        (package / "__pycache__").mkdir()
        assert engines._keeping_bytecode(environ) == environ


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("INFO 11-23 23:32:01 adapterhub.serving.rollout.rollout: acme/support@prod is 2", "acme/support@prod is 2"),
        ("(Worker pid=1) INFO 11-23 23:00:00 [cpu.py:68] Starting to load model /m...", "loading the base model"),
        ("(Worker pid=1) INFO 11-23 23:00:00 [cpu.py:68] Loading weights took 1 s", None),
        ("(EngineCore pid=1) ERROR 11-23 23:00:00 [core.py:1] it died", "EngineCore: it died"),
        ("(EngineCore pid=1) ERROR 11-23 23:00:00 [core.py:1] Traceback (most recent call last):", None),
        ("(EngineCore pid=1) ERROR 11-23 23:00:00 [core.py:1]   File x.py, line 3", None),
        ("Traceback (most recent call last):", None),
    ],
)
def test_which_lines_are_told(line: str, told: str | None) -> None:
    assert telling(line) == told


def test_the_cause_is_the_first_exception_of_the_crash() -> None:
    lines = [
        "(Worker) WARNING 11-23 23:00:00 [x.py:1] limits can cause `OSError: [Errno 24]`",
        "(Worker) ERROR 11-23 23:00:00 [x.py:1] RuntimeError: no kernel for head_dim=16",
        "vllm.v1.engine.exceptions.EngineDeadError: see above",
    ]
    assert cause(lines) == "RuntimeError: no kernel for head_dim=16"
    assert cause(["one", "two"]) == "its last lines:\none\ntwo"
