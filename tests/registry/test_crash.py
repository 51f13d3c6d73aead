"""Real processes on one folder: killed in the middle, many at once, out of disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.refs import AdapterName
from adapterhub.registry import Cache, Draft, open_registry

PUBLISHER = """
import hashlib, json, os, signal, sys
from pathlib import Path
from adapterhub.manifest import FileEntry, LoraShape, Manifest, Verdict, Verdicts
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, open_registry

root, folder, prefix, count, kill_at = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
yes = Verdict("yes")
calls = 0


def step(event, args):
    # every file that is opened, linked, made or removed is a point where the process can end
    global calls
    if event in {"open", "os.link", "os.mkdir", "os.remove"} and str(args[0]).startswith(root):
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def draft(text):
    path = folder / text
    path.mkdir(parents=True)
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": text.encode() * 50_000}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    files = tuple(FileEntry(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items())
    return Draft(path, Manifest(files=files, lora=LoraShape(4, 8, (), 1, "F32")), Verdicts(yes, yes, yes))


drafts = [draft(f"{prefix}-{n}") for n in range(count)]
registry = open_registry(root)
sys.addaudithook(step)
for one in drafts:
    print(registry.publish(one, name=AdapterName("acme", "support"), author=prefix).version, flush=True)
print("calls", calls)
"""


def publisher(root: Path, drafts: Path, prefix: str, *, count: int = 1, kill_at: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, root, drafts, prefix, str(count), str(kill_at)],
        stdout=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> list[str]:
    printed, _ = process.communicate(timeout=60)
    return printed.split()


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["first publish", "later publish"])
def test_killed_anywhere_a_publish_is_whole_or_not_there(
    tmp_path: Path, name: AdapterName, new_draft: Callable[..., Draft], first: bool
) -> None:
    """SIGKILL at eight points spread over a publish; a first one makes and proves the registry too."""
    shared = tmp_path / "registry"  # later publishes all meet what the killed ones left
    if not first:
        output(publisher(shared, tmp_path / "drafts", "zero"))
    steps = int(output(publisher(tmp_path / "count" if first else shared, tmp_path / "drafts", "count"))[-1])
    assert steps >= 8
    for number, kill_at in enumerate(range(1, steps + 1, -(-steps // 8))):
        root = tmp_path / f"registry-{number}" if first else shared
        killed = publisher(root, tmp_path / "drafts", f"kill-{number}", kill_at=kill_at)
        output(killed)
        assert killed.returncode == -signal.SIGKILL
        registry = open_registry(str(root))
        versions = registry.versions(name) if registry.tenants() else []
        assert [v.record.version for v in versions] == list(range(len(versions), 0, -1))
        for version in versions:
            folder = Cache(tmp_path / "cache", registry).fetch(version.record)
            assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        if first or number % 4 == 3:
            assert registry.publish(new_draft(), name=name, author="ana").version == len(versions) + 1


def test_publishers_in_many_processes_all_succeed(tmp_path: Path, name: AdapterName) -> None:
    root = tmp_path / "registry"
    processes = [publisher(root, tmp_path / "drafts", f"p{n}", count=6) for n in range(4)]
    numbers = [int(word) for process in processes for word in output(process)[:-2]]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(numbers) == list(range(1, 25))
    versions = open_registry(str(root)).versions(name)
    assert [v.record.version for v in versions] == list(range(24, 0, -1))
    assert len({v.record.digest for v in versions}) == 24
    assert list((root / "tmp").iterdir()) == []


FETCHER = """
import sys
from pathlib import Path
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, open_registry

registry = open_registry(sys.argv[1])
record = registry.resolve(AdapterRef.parse("acme/support")).record
print("ready", flush=True)
sys.stdin.readline()
print(Cache(Path(sys.argv[2]), registry).fetch(record))
"""


@pytest.mark.slow
def test_fetchers_in_many_processes_get_one_folder(tmp_path: Path) -> None:
    output(publisher(tmp_path / "registry", tmp_path / "drafts", "p"))
    fetchers = [
        subprocess.Popen(
            [sys.executable, "-c", FETCHER, tmp_path / "registry", tmp_path / "cache"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for fetcher in fetchers:
        assert fetcher.stdout is not None
        assert fetcher.stdout.readline() == "ready\n"
    for fetcher in fetchers:
        assert fetcher.stdin is not None
        fetcher.stdin.write("\n")
        fetcher.stdin.flush()
    folders = {fetcher.communicate(timeout=60)[0] for fetcher in fetchers}
    assert len(folders) == 1
    folder = Path(folders.pop().strip())
    assert (folder / "adapter_model.safetensors").read_bytes() == b"p-0" * 50_000
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []
