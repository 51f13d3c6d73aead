"""`ah serve`: what it refuses before anything is loaded."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.cli.main import main

Serve = Callable[..., tuple[int, str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Serve:
    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ah", "serve", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_without_a_base(serve: Serve) -> None:
    code, said = serve()
    assert (code, "ah serve --base" in said) == (2, True)


def test_a_port_in_use_names_the_command_with_another(serve: Serve, tiny_base: Path, taken: int) -> None:
    code, said = serve("--base", str(tiny_base), "--port", str(taken))
    assert code == 2
    assert f"port {taken} on 127.0.0.1 is in use" in said
    assert f"ah serve --base {tiny_base} --port {taken + 1}" in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--", "--api_key=x"], "keys belong to tenants"),
        (["--", "--api-server-count", "2"], "one replica is one engine"),
        (["--", "--max-loras", "2"], "a flag of `ah serve` itself"),
        (["--host", "0.0.0.0"], "ah key create acme"),
        (["--host", "0.0.0.0", "--no-keys"], "would let everybody in"),
        (["--keys"], "no tenant has a key"),
        (["--max-lora-rank", "24"], "--max-lora-rank 32"),
        (["--webhook", "hooks.example.com"], "--webhook 'hooks.example.com' is no URL"),
        (["--prompts", "nowhere"], "holds TENANT/ADAPTER.jsonl"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--restarts", "-1"], "--restarts"),
        (["--", "--chat-template", "x.jinja"], "the template comes with the base's folder"),
    ],
)
def test_what_is_refused_says_why(serve: Serve, tiny_base: Path, words: list[str], why: str) -> None:
    code, said = serve("--base", str(tiny_base), "--port", "0", *words)
    assert code == 2
    assert why in " ".join(said.split())


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis//x", "postgresql://x/y"])
def test_a_redis_that_is_none_is_told_before_anything_loads(
    serve: Serve, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("AH_REDIS_URL", url)
    code, said = serve("--base", str(tiny_base), "--port", "0")
    assert code == 2
    assert "AH_REDIS_URL is not a Redis URL" in said


def test_a_base_that_is_not_there(serve: Serve, tmp_path: Path) -> None:
    code, said = serve("--base", str(tmp_path / "none"))
    assert (code, "was not found" in said) == (2, True)
