"""The wheel holds exactly the tree, and works in an environment without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"adapterhub": "adapterhub", "registry": "adapterhub/registry", "serving": "adapterhub/serving",
           "trainers": "adapterhub/trainers"}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    source = _copy_of_the_tree(tmp_path_factory.mktemp("source"))
    command = [sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, env=_setup_environment())
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_no_other(wheel: Path) -> None:
    in_tree = set()
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT / folder)
            if not any((ROOT / folder / part).is_symlink() for part in path.parts[:1]):
                in_tree.add(f"{package}/{path.as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if name.endswith(".py")}
    assert in_wheel == in_tree


@pytest.mark.slow
def test_the_wheel_works_without_torch(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python), str(wheel)]
    subprocess.run(install, check=True, env=_setup_environment())
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0

    # A folder of the user's own with one of our folder names must not get in the way.
    (tmp_path / "work" / "registry").mkdir(parents=True)
    (tmp_path / "work" / "registry" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    clean = {"PATH": os.environ["PATH"], "AH_HOME": str(tmp_path / "home")}
    for arguments, expected in ([["--help"], "publish"], [["publish", "--help"], "--name"], [["ls"], ""]):
        done = subprocess.run(
            [environment / "bin" / "ah", *arguments], cwd=tmp_path / "work", env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def _copy_of_the_tree(to: Path) -> Path:
    """Builds leave files behind; the checkout stays clean."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, to / name
        if source.is_symlink() or not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return to


def _setup_environment() -> dict[str, str]:
    """The caller's pip settings, as the set-up script hands them to uv."""
    code = "import json, os, setup_env as s; print(json.dumps(s.uv_environment(s.pip_settings(), os.environ)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", check=True, capture_output=True, text=True
    ).stdout
    return os.environ | json.loads(found)
