"""`ah serve` as a process: how it ends, and what it leaves behind. Engines of its own, because they are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapterhub.serving.guard import session_processes

pytestmark = pytest.mark.engine


class Served:
    """A running `ah serve`, with what it said."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._said = folder / "said.txt"
        with self._said.open("wb") as said:
            registry = (folder / "registry").as_uri()
            flags = ["--base", base, "--port", "0", "--registry", registry, "--max-model-len", "512"]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "adapterhub.cli.main", "serve", *flags, "--", "--enforce-eager"],
                env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
                stderr=said,
            )
        self.until(self._children)
        self.guard = self._children()[0]

    @property
    def said(self) -> str:
        return self._said.read_text()

    def ready(self) -> str:
        """The URL, once it answers."""
        self.until(lambda: "\nready after" in self.said or self.process.poll() is not None, seconds=300)
        url = re.search(r"ready after .*: (http://\S+)/v1", self.said)
        assert url, self.said
        return url[1]

    def engine(self) -> list[int]:
        return session_processes(self.guard)

    def until(self, condition: Callable[[], object], *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def _children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.until(lambda: not self.engine())


@pytest.fixture
def serve(base_dir: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(base_dir, tmp_path)
    try:
        yield served
    finally:
        served.end()


def test_an_engine_killed_while_it_streams_is_a_crash_that_says_so(serve: Served) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 450, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{serve.ready()}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        chunks = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        assert next(chunks)["choices"]
        core = next(pid for pid in serve.engine() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(core, signal.SIGKILL)
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert [chunk for chunk in chunks if "error" in chunk] == []
            raise AssertionError("the stream ended as if it were whole")
    assert serve.process.wait(timeout=60) == 1
    assert "error: the engine ended by itself" in serve.said
    assert ".log" in serve.said.rsplit("next:", 1)[1]
    serve.until(lambda: not serve.engine())


def test_ctrl_c_ends_every_process(serve: Served) -> None:
    url = serve.ready()
    assert "curl " in serve.said
    assert "no API keys" in serve.said
    assert httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"] == "base"
    assert len(serve.engine()) >= 4  # guard, API server, engine core, worker
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(timeout=60) == 0
    assert serve.engine() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_sigterm_while_it_starts_ends_every_process(serve: Served) -> None:
    serve.until(lambda: len(serve.engine()) >= 2)
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(timeout=60) == 0
    assert serve.engine() == []
