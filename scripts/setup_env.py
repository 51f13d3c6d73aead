"""Makes `.venv` with everything AdapterHub needs to train, serve and be tested; does nothing when nothing changed.

    python3 scripts/setup_env.py [--accelerator auto|cpu|gpu]

With an NVIDIA GPU the GPU build of vLLM is installed, else the CPU build. uv installs (seconds instead of minutes)
and is told what pip is set to here: indexes, wheel folders, certificates, constraints, proxies. Only the standard
library is used, since this runs first.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / ".adapterhub-setup"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "constraints.txt"
CPU_OVERRIDES = ROOT / "scripts" / "overrides-cpu.txt"

# pip's setting → uv's variable, and what joins several values there.
UV_SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make .venv; do nothing when nothing changed.")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    kind = parser.parse_args().accelerator
    if kind == "auto":
        kind = "gpu" if has_nvidia_gpu() else "cpu"
    if sys.version_info < (3, 11):  # noqa: UP036 - this script runs before anything checked the version
        sys.exit(
            f"error: AdapterHub needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11"
        )
    wanted = state(kind)
    if STAMP.is_file() and STAMP.read_text() == wanted and runs(PYTHON):
        return
    say(f"setting up .venv ({kind})")
    make_venv()
    install(kind)
    STAMP.write_text(wanted)


def state(kind: str) -> str:
    """Everything that decides what is installed."""
    digest = hashlib.sha256(f"{kind} {sys.version} {VENV}".encode())
    for file in (ROOT / "pyproject.toml", CONSTRAINTS, CPU_OVERRIDES, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    STAMP.unlink(missing_ok=True)
    if not runs(PYTHON):
        shutil.rmtree(VENV, ignore_errors=True)
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            sys.exit("error: this Python cannot make virtual environments: on Debian, apt-get install python3-venv")
    run([str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", "uv>=0.9"], dict(os.environ))


def install(kind: str) -> None:
    settings = pip_settings()
    environment = os.environ | uv_environment(settings, os.environ)
    command = [str(PYTHON), "-m", "uv", "pip", "install", "-q", "--python", str(PYTHON)]
    # Compiled once here: where Python may not write bytecode (containers), each `import vllm` takes 8 s longer.
    command += ["--compile-bytecode", "--constraint", str(CONSTRAINTS)]
    if kind == "cpu":
        command += ["--override", str(CPU_OVERRIDES)]
        if not holds_cpu_torch(settings.get("find-links", [])):
            command += ["--torch-backend", "cpu"]
    extras = "train,serve,dev" if kind == "gpu" else "train,serve-cpu,dev"
    run([*command, "--editable", f"{ROOT}[{extras}]"], environment)


def pip_settings() -> dict[str, list[str]]:
    """What pip is set to here, from its files and from PIP_ variables, as it says itself."""
    listed = subprocess.run([PYTHON, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    return parse_pip_config(listed)


def parse_pip_config(listed: str) -> dict[str, list[str]]:
    """``pip config list`` prints ``section.key='value'``; files first by section, the environment wins."""
    rank = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listed.splitlines():
        name, equals, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if equals and section in rank and rank[section] >= found.get(key, (0, []))[0]:
            found[key] = (rank[section], str(ast.literal_eval(value)).split())
    return {key: values for key, (_, values) in found.items()}


def uv_environment(settings: Mapping[str, list[str]], environ: Mapping[str, str]) -> dict[str, str]:
    """The same settings for uv; what the caller set for uv stays."""
    out = {
        variable: joiner.join(settings[key])
        for key, (variable, joiner) in UV_SETTINGS.items()
        if settings.get(key) and variable not in environ
    }
    if out.get("UV_NO_INDEX", "").lower() in {"0", "false", "no", "off"}:
        del out["UV_NO_INDEX"]
    if "UV_INDEX" in out:
        # pip looks at all indexes and takes the best; uv would stop at the first that knows the name.
        out.setdefault("UV_INDEX_STRATEGY", environ.get("UV_INDEX_STRATEGY", "unsafe-best-match"))
    return out


def holds_cpu_torch(places: list[str]) -> bool:
    """Whether one of the caller's wheel folders has the CPU build of torch; then no other index is needed for it."""
    folders = [Path(unquote(urlparse(p).path)) if p.startswith("file:") else Path(p).expanduser() for p in places]
    return any(next(folder.glob("torch-*+cpu-*.whl"), None) is not None for folder in folders if folder.is_dir())


def has_nvidia_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def runs(python: Path) -> bool:
    """Whether the environment is alive: a moved checkout or a removed Python leaves a dead one."""
    try:
        return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def run(command: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=dict(environment))
    if done.returncode:
        sys.exit(f"error: set-up failed at: {' '.join(command)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
