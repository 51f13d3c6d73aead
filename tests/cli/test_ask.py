"""`ah ask` against a small real HTTP server that speaks the API."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from adapterhub.cli.main import main

WORDS = ("Your ", "parcel ", "is on its way.")


class Api(BaseHTTPRequestHandler):
    """Adapters acme/support@1 and @2, and the base. The model acme/broken breaks off, acme/gone is yanked."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        model = asked["model"]
        if model == "acme/gone":
            self._answer(410, {"error": {"message": "acme/gone@1 was yanked: bad tone", "code": 410}})
        elif model == "acme/nobody":
            self._answer(404, {"error": {"message": "the model acme/nobody does not exist", "code": 404}})
        elif asked.get("stream"):
            self._stream(model)
        else:
            message = {"role": "assistant", "content": f"{model}: {''.join(WORDS)}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._answer(
                200, {"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
            )

    def _stream(self, model: str) -> None:
        self._start(200, "text/event-stream")
        for i, word in enumerate(WORDS):
            last = i + 1 == len(WORDS)
            if last and model == "acme/broken":
                return
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": "stop" if last else None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": model, "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._start(status, "application/json")
        self.wfile.write(json.dumps(body).encode())

    def _start(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("x-adapterhub-version", "acme/support@2")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@dataclass
class Done:
    """What a command did."""

    code: int
    stdout: str
    stderr: str


class Server:
    def __init__(self) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        self._http.asked = self.asked = []  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(scope="module")
def api() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


Ask = Callable[..., Done]


@pytest.fixture
def ask(api: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(*words: str, stdin: str = "", url: str = api.url) -> Done:
        monkeypatch.setattr(sys, "argv", ["ah", "ask", *words, "--url", url])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    return run


def test_the_answer_goes_to_stdout_and_its_version_to_stderr(api: Server, ask: Ask) -> None:
    done = ask("acme/support", "Where is my parcel?", "--system", "Be short.", "--max-tokens", "9")
    assert (done.code, done.stdout) == (0, "Your parcel is on its way.\n")
    assert "acme/support@2" in done.stderr
    asked = api.asked[-1]
    assert asked["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Where is my parcel?"},
    ]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("acme/support", 9, 0)


def test_the_question_from_stdin(api: Server, ask: Ask) -> None:
    assert ask("base", "-", stdin="From a pipe\n").code == 0
    assert api.asked[-1]["messages"][-1]["content"] == "From a pipe\n"


def test_compare_asks_the_base_and_every_model(ask: Ask) -> None:
    done = ask("acme/support@1", "acme/support@2", "Hello?", "--compare")
    assert done.code == 0, done.stderr
    answers = [f"{model}: {''.join(WORDS)}" for model in ("base", "acme/support@1", "acme/support@2")]
    positions = [done.stdout.index(answer) for answer in answers]
    assert positions == sorted(positions)
    assert done.stdout.startswith("== acme/support@2 ==\n")  # what the server says it was


def test_json(ask: Ask) -> None:
    one = json.loads(ask("acme/support@prod", "Hello?", "--json").stdout)
    text = f"acme/support@prod: {''.join(WORDS)}"
    assert one == {"model": "acme/support@prod", "version": "acme/support@2", "text": text}
    both = json.loads(ask("acme/support", "Hello?", "--json", "--compare").stdout)
    assert [answer["model"] for answer in both] == ["base", "acme/support"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["acme/nobody", "Hello?"], 2, ["acme/nobody was not found", "does not exist", "ah ls"]),
        (["acme/gone", "Hello?"], 2, ["acme/gone is gone", "bad tone", "ah show acme/gone"]),
        (["acme/broken", "Hello?"], 1, ["the answer broke off"]),
        (["acme/broken", "acme/support", "Hello?"], 2, ["2 models were named", "--compare"]),
        (["Hello?"], 2, ["a model and a question are needed"]),
        (["../etc", "Hello?"], 2, ["is not a tenant name"]),
        (["acme/support", " "], 2, ["the question is empty"]),
    ],
)
def test_what_cannot_be_answered_says_why(ask: Ask, words: list[str], code: int, told: list[str]) -> None:
    done = ask(*words)
    assert done.code == code, done.stderr
    for part in told:
        assert part in done.stderr


def test_no_server_names_the_command_that_starts_one(ask: Ask) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    done = ask("base", "Hello?", url=url)
    assert done.code == 1
    assert f"no server answers at {url}" in done.stderr
    assert "ah serve" in done.stderr


def test_an_address_that_is_no_url(ask: Ask) -> None:
    done = ask("base", "Hello?", url="localhost:8000")
    assert (done.code, "is not a URL" in done.stderr) == (2, True)
