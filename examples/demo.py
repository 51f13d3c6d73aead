"""The main job, end to end, on a real model: `make demo`.

Trains adapters for two tenants, publishes them, serves both and the base from one vLLM process, swaps a version under
a streaming answer, rolls back, and exports one adapter to a standalone model that answers the same. Everything is done
with the `ah` commands that a user types, printed as they run. Exits non-zero if any of it is not so.

    python examples/demo.py [--base DIR|HUB_ID]

All files go to `.demo/`; your own registry is not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = Path(__file__).resolve().parent
DEMO = ROOT / ".demo"
AH = Path(sys.executable).with_name("ah")

SUPPORT = "harbor/support"
DESK = "acme/order-desk"
console = Console(highlight=False, soft_wrap=True)


class DemoFailed(Exception):
    """Something that the demo promises was not so."""


@dataclass
class Story:
    """What was done, seconds each, and where the files are: the closing table."""

    rows: list[tuple[str, float, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, title: str, where: str = "") -> Iterator[None]:
        console.print(f"\n[bold cyan]━━ {escape(title)}[/]")
        start = time.monotonic()
        yield
        self.rows.append((title, time.monotonic() - start, where))

    def table(self) -> Table:
        table = Table(title="What was done", title_justify="left")
        table.add_column("step")
        table.add_column("seconds", justify="right")
        table.add_column("files", overflow="fold")
        for title, seconds, where in self.rows:
            table.add_row(escape(title), f"{seconds:.1f}", escape(where))
        table.add_section()
        table.add_row("all", f"{sum(seconds for _, seconds, _ in self.rows):.1f}", "")
        return table


@dataclass(frozen=True)
class Answer:
    text: str
    version: str  # the immutable version that answered, from the response header; "base" for the base


class Server:
    """`ah serve` as a child process, on a free port."""

    def __init__(self, *, base: str, log: Path, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._log = log
        # float32, so that answers can be compared byte for byte (docs/serving.md, "Greedy answers").
        command = ah_command("serve", "--base", base, "--port", self.url.rpartition(":")[2], "--dtype", "float32")
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="single-user", max_retries=0, timeout=300)

    def wait_ready(self, *, seconds: float = 300) -> None:
        """Raises DemoFailed when the server ends or does not come up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OpenAIError):
                self.client.models.list()
                return
            time.sleep(0.5)
        raise DemoFailed(f"the server did not come up; its log is {self._log}:\n{self._log.read_text()[-2000:]}")

    def ask(self, model: str, prompt: list[dict[str, str]], *, tokens: int = 64) -> Answer:
        """One greedy answer."""
        raw = self.client.chat.completions.with_raw_response.create(
            model=model, messages=prompt, max_tokens=tokens, temperature=0
        )
        text = raw.parse().choices[0].message.content or ""
        return Answer(text, raw.headers.get("x-adapterhub-version", "base"))

    def wait_for(self, model: str, version: str, *, seconds: float = 60) -> float:
        """Ask until ``model`` is answered by ``version``; returns the seconds it took."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.ask(model, QUESTION, tokens=1).version == version:
                return time.monotonic() - start
            time.sleep(0.2)
        raise DemoFailed(f"{model} was not answered by {version} within {seconds:.0f} s")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise DemoFailed("the server did not stop on SIGTERM") from None
        if code != 0:
            raise DemoFailed(f"the server stopped with exit code {code}; its log is {self._log}")

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=30)
            self._process.kill()


class Traffic:
    """A client that asks a model in a loop, and counts what it gets."""

    def __init__(self, server: Server, model: str) -> None:
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server, model))

    def _run(self, server: Server, model: str) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(server.ask(model, QUESTION, tokens=24))
            except OpenAIError as error:
                self.failures.append(str(error))

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class LongAnswer:
    """A streaming answer, long enough to be under way while a version is swapped."""

    def __init__(self, server: Server, model: str) -> None:
        self.version = ""
        self.text = ""
        self.error = ""
        self.started = threading.Event()
        self._server, self._model = server, model
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            raw = self._server.client.chat.completions.with_raw_response.create(
                model=self._model, messages=QUESTION, max_tokens=400, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            self.version = raw.headers["x-adapterhub-version"]
            for chunk in raw.parse():
                if chunk.choices and chunk.choices[0].delta.content:
                    self.text += chunk.choices[0].delta.content
                    self.started.set()
        except OpenAIError as error:
            self.error = str(error)
        finally:
            self.started.set()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


QUESTION = [{"role": "user", "content": "My parcel has not arrived yet. What can I do?"}]


def main() -> None:
    parser = argparse.ArgumentParser(description="The main job, end to end, on a real model.")
    parser.add_argument("--base", help="a model folder or a Hub id; default: the small model that is set up here")
    asked = parser.parse_args().base
    if asked and Path(asked).is_dir():
        asked = str(Path(asked).resolve())

    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    environment = os.environ | {"AH_HOME": str(DEMO / "home"), "AH_AUTHOR": "demo"}
    for name in ("AH_REGISTRY", "AH_CACHE", "AH_BASE"):
        environment.pop(name, None)

    story = Story()
    try:
        run_demo(story, asked, environment)
    except DemoFailed as error:
        console.print(f"\n[bold red]The demo failed:[/] {escape(str(error))}")
        sys.exit(1)
    console.print()
    console.print(story.table())
    console.print("All of it is so. The files are in .demo/; `make demo` starts over.")


def run_demo(story: Story, asked: str | None, environment: dict[str, str]) -> None:
    """The main path: each step checks what it shows, and raises DemoFailed."""
    with story.step("Base model", where=asked or ".models/"):
        base = asked or prepare_base()
        console.print(f"base: {escape(base)}")

    with story.step("Train three adapters, for two tenants", where=".demo/runs/"):
        train(environment, base, "support-bot/config.yml", "support-1")
        train(environment, base, "function-calling/config.yml", "order-desk")
        train(environment, base, "support-bot/config-v2.yml", "support-2")

    with story.step("Publish version 1 of each", where=".demo/home/registry/"):
        ah(environment, "publish", ".demo/runs/support-1", "--name", SUPPORT, "--channel", "prod", "--base", base)
        ah(environment, "publish", ".demo/runs/order-desk", "--name", DESK, "--channel", "prod", "--base", base)
        ah(environment, "ls")

    with contextlib.ExitStack() as cleanup:
        with story.step("Start one vLLM process for both", where=".demo/serve.log"):
            server = Server(base=base, log=DEMO / "serve.log", environment=environment)
            cleanup.callback(server.kill)
            server.wait_ready()
            console.print(f"serving at {server.url}/v1")

        with story.step("Ask the base and both tenants' adapters"):
            ask_side_by_side(server)

        with story.step("Publish version 2 while version 1 streams an answer"):
            hot_swap(server, environment, base)

        with story.step("Roll back"):
            with Traffic(server, f"{SUPPORT}@prod") as traffic:
                ah(environment, "channel", "rollback", SUPPORT, "prod", "--why", "the demo goes back")
                server.wait_for(f"{SUPPORT}@prod", f"{SUPPORT}@1")
            expect(not traffic.failures, f"{len(traffic.failures)} requests failed: {traffic.failures[:1]}")
            console.print(f"answered by {SUPPORT}@1 again; {len(traffic.answers)} requests meanwhile, 0 failed")
            ah(environment, "channel", "log", SUPPORT, "prod")

        prompts = held_out_prompts("support-bot")
        served = [server.ask(f"{SUPPORT}@prod", prompt).text for prompt in prompts]
        with story.step("Stop the server"):
            server.stop()

    with story.step("Export to a standalone model", where=".demo/model/"):
        ah(environment, "export", f"{SUPPORT}@prod", "--base", base, "--to", ".demo/model", "--dtype", "float32")

    with contextlib.ExitStack() as cleanup, story.step("Ask the exported model the same", where=".demo/model.log"):
        alone = Server(base=".demo/model", log=DEMO / "model.log", environment=environment)
        cleanup.callback(alone.kill)
        alone.wait_ready()
        exported = [alone.ask("base", prompt).text for prompt in prompts]
        equal = sum(a == b for a, b in zip(served, exported, strict=True))
        console.print(f"{equal} of {len(prompts)} greedy answers equal the served adapter's, byte for byte")
        expect(equal == len(prompts), "the exported model answers differently")
        alone.stop()


def prepare_base() -> str:
    command = [sys.executable, str(ROOT / "scripts" / "demo_base.py")]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return os.path.relpath(made.stdout.strip(), ROOT)


def train(environment: dict[str, str], base: str, config: str, run: str) -> None:
    ah(environment, "train", f"examples/{config}", "--base", base, "--out", f".demo/runs/{run}")


def ask_side_by_side(server: Server) -> None:
    """The difference to the base must be plain to see, and each tenant's adapter must be its own."""
    desk = held_out_prompts("function-calling")[0]
    for prompt, model, version in ((QUESTION, SUPPORT, f"{SUPPORT}@1"), (desk, DESK, f"{DESK}@1")):
        base, adapter = server.ask("base", prompt), server.ask(f"{model}@prod", prompt)
        table = Table("model", "answer", title=escape(prompt[-1]["content"]), title_justify="left", show_lines=True)
        table.add_row("base", escape(base.text))
        table.add_row(f"{model}@prod\n[dim]{adapter.version}[/]", escape(adapter.text))
        console.print(table)
        expect(adapter.version == version, f"{model}@prod was answered by {adapter.version}")
        expect(adapter.text != base.text, f"{model} answers like the base")


def hot_swap(server: Server, environment: dict[str, str], base: str) -> None:
    """The stream that began on version 1 ends on it; the next request is answered by version 2; nothing fails."""
    alone = server.ask(f"{SUPPORT}@1", QUESTION).text
    with Traffic(server, f"{SUPPORT}@prod") as traffic:
        stream = LongAnswer(server, f"{SUPPORT}@prod")
        stream.started.wait()
        ah(environment, "publish", ".demo/runs/support-2", "--name", SUPPORT, "--channel", "prod", "--base", base)
        seconds = server.wait_for(f"{SUPPORT}@prod", f"{SUPPORT}@2")
        overlapped = stream.running
        after = server.ask(f"{SUPPORT}@prod", QUESTION)
        stream.wait()
    expect(not stream.error, f"the stream failed: {stream.error}")
    expect(stream.version == f"{SUPPORT}@1", f"the stream was answered by {stream.version}")
    expect(overlapped, "the stream ended before the swap: nothing was shown")
    expect(stream.text.startswith(alone), "the stream did not stay with version 1's answer")
    expect(after.version == f"{SUPPORT}@2", f"the next request was answered by {after.version}")
    expect(not traffic.failures, f"{len(traffic.failures)} requests failed: {traffic.failures[:1]}")
    counts = {v: sum(a.version == v for a in traffic.answers) for v in (f"{SUPPORT}@1", f"{SUPPORT}@2")}
    expect(sum(counts.values()) == len(traffic.answers), "an answer carried another version")
    console.print(
        f"the stream began and ended on {SUPPORT}@1; {SUPPORT}@2 answers since {seconds:.1f} s after the publish"
    )
    console.print(f"requests meanwhile: {counts}, 0 failed")
    console.print(f"version 2 says: {escape(after.text)}")


def held_out_prompts(example: str) -> list[list[dict[str, str]]]:
    lines = (EXAMPLES / example / "eval.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][:-1] for line in lines]


def ah(environment: dict[str, str], *arguments: str) -> None:
    """Run an `ah` command where the user can see it."""
    console.print(f"[bold]$ ah {escape(shlex.join(arguments))}[/]")
    sys.stdout.flush()
    done = subprocess.run(ah_command(*arguments), env=environment, cwd=ROOT)
    if done.returncode:
        raise DemoFailed(f"`ah {shlex.join(arguments)}` ended with exit code {done.returncode}")


def ah_command(*arguments: str) -> list[str]:
    return [str(AH), *arguments]


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DemoFailed(otherwise)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
