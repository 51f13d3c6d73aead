"""What `ah` says where somebody put something else into a registry or a cache than AdapterHub did."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import canonical_json
from adapterhub.refs import AdapterName
from adapterhub.registry import Cache, open_registry
from adapterhub.registry.store import MAX_VALUE

Ah = Callable[..., Any]
CONFIG = "adapter_config.json"


@pytest.fixture
def registry(ah: Ah, adapter_factory: Callable[..., Path]) -> Path:
    """``acme/support@1``."""
    assert ah("publish", adapter_factory(), "--name", "acme/support").code == 0
    return Path(os.environ["AH_HOME"]) / "registry"


def record_of(registry: Path) -> Path:
    (found,) = (registry / "t" / "acme" / "a" / "support" / "v").iterdir()
    found.chmod(0o644)
    return found


def forge(registry: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Whoever may write there can also make the digest right."""
    path = record_of(registry)
    plain = json.loads(path.read_text())
    change(plain)
    plain["digest"] = "sha256:" + hashlib.sha256(canonical_json(plain["manifest"])).hexdigest()
    path.write_text(json.dumps(plain))


def first_file(plain: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(file for file in plain["manifest"]["files"] if file["path"] == CONFIG)
    return found


def refused(done: Any, *said: str, code: int = 1) -> None:
    """1: it broke under its user, who typed nothing wrong."""
    assert (done.code, done.out) == (code, ""), done
    assert done.err.startswith("error: ")
    assert "next:" in done.err and "Traceback" not in done.err
    for text in said:
        assert text in done.err


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "", "a//b", "nul\0"])
@pytest.mark.parametrize("command", [("show",), ("pull", "--to", "out")])
def test_a_path_that_leaves_its_folder(ah: Ah, registry: Path, command: tuple[str, ...], path: str) -> None:
    forge(registry, lambda plain: first_file(plain).update(path=path))
    refused(ah(command[0], "acme/support@1", *command[1:]), "the record of acme/support@1", "ah fsck acme/support")
    assert not Path("out").exists()


@pytest.mark.parametrize("again", [CONFIG, CONFIG.upper()])
def test_a_path_that_is_there_twice(ah: Ah, registry: Path, again: str) -> None:
    """Also where a file system takes two names for one."""
    forge(registry, lambda plain: plain["manifest"]["files"].append({**first_file(plain), "path": again}))
    refused(ah("pull", "acme/support@1", "--to", "out"), "two files in one place", "ah fsck acme/support")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [({"sha256": "0" * 64}, "are not in the registry", 2), ({"size": 1}, "is not what was published", 1)],
)
def test_bytes_that_are_others_than_the_manifest_says(
    ah: Ah, registry: Path, change: dict[str, Any], said: str, code: int
) -> None:
    forge(registry, lambda plain: first_file(plain).update(change))
    refused(ah("pull", "acme/support@1", "--to", "out"), f"{CONFIG} of acme/support@1", said, code=code)
    assert not Path("out").exists()
    done = ah("fsck", "acme/support")
    assert done.code == 1
    assert "acme/support@1" in done.out + done.err


def test_a_record_that_is_not_its_digest(ah: Ah, registry: Path) -> None:
    path = record_of(registry)
    path.write_text(path.read_text().replace('"rank":', '"rank": 1, "was":'))
    refused(ah("pull", "acme/support@1", "--to", "out"), "the record of acme/support@1", "ah fsck acme/support")


@pytest.mark.parametrize("where", ["record", "manifest"])
def test_a_format_of_a_newer_version(ah: Ah, registry: Path, where: str) -> None:
    forge(registry, lambda plain: (plain if where == "record" else plain["manifest"]).update(format=99))
    for command in (("show", "acme/support@1"), ("ls", "acme/support"), ("pull", "acme/support@1", "--to", "out")):
        refused(ah(*command), "has format 99", "pip install --upgrade adapterhub", code=2)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "[" * 10_000, '{"a": NaN}', "\ufeff{}", "no JSON"])
def test_a_record_that_is_none(ah: Ah, registry: Path, content: str) -> None:
    record_of(registry).write_text(content)
    refused(ah("show", "acme/support@1"), "the record of acme/support@1 cannot be used", "ah fsck acme/support")


def test_a_record_of_a_hundred_megabytes_is_not_read(ah: Ah, registry: Path) -> None:
    with record_of(registry).open("r+b") as file:
        file.truncate(100_000_000)  # a hole: no disk is needed
    said = f"100000000 bytes; at most {MAX_VALUE}"
    for command in (("show", "acme/support@1"), ("ls", "acme/support"), ("pull", "acme/support@1", "--to", "out")):
        refused(ah(*command), "too large to be read", said, "ah fsck acme/support")


def test_a_cache_that_was_tampered_with_is_never_handed_out(ah: Ah, registry: Path, tmp_path: Path) -> None:
    """A server fetches through the cache; what was changed there is taken out and fetched again."""
    opened = open_registry(registry.as_uri())
    record = opened.version(AdapterName("acme", "support"), 1).record
    folder = Cache(tmp_path / "cache", opened).fetch(record)
    there = (folder / CONFIG).read_bytes()
    (folder / CONFIG).chmod(0o644)
    (folder / CONFIG).write_bytes(there.replace(b"r", b"R"))
    again = Cache(tmp_path / "cache", open_registry(registry.as_uri())).fetch(record)
    assert (again / CONFIG).read_bytes() == there
    blob = registry / "t" / "acme" / "blobs" / "sha256" / sha256(there)[:2] / sha256(there)
    blob.chmod(0o644)
    blob.write_bytes(there.replace(b"r", b"R"))
    refused(ah("pull", "acme/support@1", "--to", "out"), "is not what was published", "ah fsck acme/support")
    assert not Path("out").exists()


@pytest.mark.slow
def test_two_pulls_into_one_cache_at_once(registry: Path) -> None:
    command = [sys.executable, "-m", "adapterhub.cli.main", "pull", "acme/support@1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pulls = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    told = [pull.communicate(timeout=60) for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0, 0], told
    (folder,) = {out.strip() for out, _ in told}
    assert sorted(path.name for path in Path(folder).iterdir()) == [CONFIG, "adapter_model.safetensors"]
    assert list((Path(os.environ["AH_HOME"]) / "cache" / "tmp").iterdir()) == []


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
