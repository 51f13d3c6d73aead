"""Adapters that others pushed to the Hub: one revision of a repository, as a folder for `drafts.draft`.

    with fetched("hf://someone/lora@main") as (folder, source):
        registry.publish(draft(folder), name=…, author=…, labels=source.labels)

The revision is looked up once; everything is read at that commit, and the commit goes into the labels.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import AdapterError, IntegrityError, UsageError
from adapterhub.peftdir import CONFIG, WEIGHTS
from adapterhub.registry.drafts import BESIDE
from adapterhub.registry.files import storage_errors
from adapterhub.registry.hub.client import Blob, Hub

_SOURCE = re.compile(r"hf://(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^@\s]+))?")
_CHUNK = 1 << 20  # bytes
_PICKLED = (".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class HubSource:
    """One commit of somebody's repository."""

    repo: str
    commit: str

    @property
    def labels(self) -> dict[str, str]:
        """Say in the version where it came from."""
        return {"hub": self.repo, "hub_commit": self.commit}


def is_hub_source(text: str) -> bool:
    return text.startswith("hf://")


@contextmanager
def fetched(text: str, *, endpoint: str | None = None, token: str | None = None) -> Iterator[tuple[Path, HubSource]]:
    """A folder with the adapter of ``hf://owner/repository[@revision]``; it is removed afterwards.

    Raises UsageError, NotFound, AdapterError for a repository without a safetensors adapter, IntegrityError for bytes
    that are not those of the commit, StorageError.
    """
    found = _SOURCE.fullmatch(text)
    if not found:
        raise UsageError(
            f"{text!a} names no repository of the Hub",
            why="it is written hf://owner/repository, and @revision behind it for another than main",
            hint="ah publish hf://someone/lora@main --name acme/support",
        )
    repo = found["repo"]
    hub = Hub(repo.partition("/")[0], endpoint=endpoint, token=token)
    source = HubSource(repo, hub.commit_of(repo, found["revision"]))
    tree = hub.tree(repo, source.commit)
    _check(tree, source)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        for path in (CONFIG, WEIGHTS, *BESIDE):
            if path in tree:
                _download(hub, source, path, tree[path], Path(folder) / path)
        yield Path(folder), source


def _check(tree: dict[str, Blob], source: HubSource) -> None:
    missing = [path for path in (CONFIG, WEIGHTS) if path not in tree]
    if not missing:
        return
    pickled = [path for path in tree if path.endswith(_PICKLED)]
    raise AdapterError(
        f"hf://{source.repo}@{source.commit[:12]} holds no adapter that can be published",
        why=f"it has no {missing[0]}" + (f"; {pickled[0]} is a pickle, and those are never loaded" if pickled else ""),
        hint="ask its author for safetensors (PEFT's save_pretrained writes them), or name another revision",
    )


def _download(hub: Hub, source: HubSource, path: str, blob: Blob, destination: Path) -> None:
    """Write one file, and compare it with what the commit says: size, and sha256 or git's name of it."""
    sha256, sha1, size = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % blob.size, usedforsecurity=False), 0
    with (
        hub.open(source.repo, path, source.commit) as stream,
        storage_errors(f"{destination} cannot be written"),
        destination.open("wb") as file,
    ):
        while size <= blob.size and (chunk := stream.read(_CHUNK)):
            file.write(chunk)
            sha256.update(chunk)
            sha1.update(chunk)
            size += len(chunk)
    is_right = sha256.hexdigest() == blob.sha256 if blob.sha256 else sha1.hexdigest() == blob.sha1
    if size != blob.size or not is_right:
        raise IntegrityError(
            f"{path} of hf://{source.repo} is not what its commit says",
            why=f"{source.commit[:12]} has {blob.size} bytes with another hash than what arrived",
            hint="type the same command again",
        )
