"""The policies of deploy/iam, each as what it lets somebody do: a registry is run behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from adapterhub.errors import Gone, StorageError
from adapterhub.manifest import FileEntry, LoraShape, Manifest, Record, Verdict, Verdicts
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Cache, Draft, ObjectRegistry
from adapterhub.registry.doctor import prove
from adapterhub.registry.fsck import fsck
from adapterhub.registry.lifecycle.gc import Patience, collect
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.signing import sign
from adapterhub.registry.store import Entry

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "iam"
POLICIES = sorted(path.stem for path in FOLDER.glob("*.json"))
SUPPORT, THEIRS = AdapterName("acme", "support"), AdapterName("beta", "bot")
ROOT = "models/registry"  # of the registry in its bucket


@dataclass(frozen=True)
class Policy:
    """As AWS judges: a matching Deny refuses, else a matching Allow lets through, else it is refused."""

    statements: list[dict[str, Any]]

    @classmethod
    def read(cls, name: str) -> Policy:
        text = (FOLDER / f"{name}.json").read_text()
        filled = text.replace("BUCKET", "bucket").replace("PREFIX", ROOT).replace("TENANT", "acme")
        return cls(json.loads(filled)["Statement"])

    def allows(self, action: str, resource: str, context: dict[str, str]) -> bool:
        effects = {s["Effect"] for s in self.statements if _matches(s, action, resource, context)}
        return effects == {"Allow"}


def _matches(statement: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    return (
        action in _list(statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in _list(statement["Resource"]))
        and all(_holds(kind, tests, context) for kind, tests in statement.get("Condition", {}).items())
    )


def _holds(kind: str, tests: dict[str, Any], context: dict[str, str]) -> bool:
    if kind == "Null":
        return all((key not in context) == (wanted == "true") for key, wanted in tests.items())
    assert kind == "StringLike"
    return all(
        key in context and any(fnmatchcase(context[key], pattern) for pattern in _list(patterns))
        for key, patterns in tests.items()
    )


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


class Guarded(MemoryStore):
    """The store behind a policy: each call asks for what S3 would ask for."""

    def __init__(self, store: MemoryStore, policy: Policy) -> None:
        super().__init__()
        self._values, self._modified, self._lock = store._values, store._modified, store._lock
        self._policy = policy
        self._inside = False  # one call asks once, however it is built

    @contextmanager
    def _asking(self, action: str, key: str, context: dict[str, str] | None = None) -> Iterator[None]:
        if self._inside:
            yield
            return
        resource = "arn:aws:s3:::bucket" + (f"/{ROOT}/{key}" if key else "")
        if not self._policy.allows(action, resource, context or {}):
            raise StorageError(f"{action} on {resource} is not allowed", why=str(context))
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _listing(self, prefix: str) -> Any:
        return self._asking("s3:ListBucket", "", {"s3:prefix": f"{ROOT}/{prefix}"})

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        with self._asking("s3:PutObject", key, {"s3:if-none-match": "*"}):
            super().create(key, value, lasting=lasting)

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        with self._asking("s3:PutObject", key):
            super().create_file(key, source, size=size, sha256=sha256)

    def read(self, key: str) -> bytes:
        with self._asking("s3:GetObject", key):
            return super().read(key)

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        with self._asking("s3:GetObject", key):
            return super().open(key, offset=offset)

    def exists(self, key: str) -> bool:
        with self._asking("s3:GetObject", key):
            return super().exists(key)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with self._listing(prefix):
            return super().keys(prefix, after=after, limit=limit)

    def entries(self, prefix: str) -> Iterator[Entry]:
        with self._listing(prefix):
            yield from list(super().entries(prefix))

    def folders(self, prefix: str) -> list[str]:
        with self._listing(prefix):
            return super().folders(prefix)

    def delete(self, *keys: str) -> None:
        for key in keys:
            with self._asking("s3:DeleteObject", key):
                super().delete(key)


@pytest.fixture
def new_draft(tmp_path: Path) -> Callable[[str], Draft]:
    def make(text: str) -> Draft:
        folder = tmp_path / f"draft-{text}"
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text(text)
        file = FileEntry("weights", len(text), hashlib.sha256(text.encode()).hexdigest())
        yes = Verdict("yes")
        manifest = Manifest((file,), LoraShape(4, 8, (), 1, "F32"))
        return Draft(folder, manifest, Verdicts(yes, yes, yes))

    return make


@pytest.fixture
def store(new_draft: Callable[[str], Draft]) -> MemoryStore:
    """Two tenants, as whoever owns the bucket made them."""
    store = MemoryStore()
    registry = ObjectRegistry(store)
    for name in (SUPPORT, THEIRS):
        registry.publish(new_draft(str(name.adapter)), name=name, author="ana")
        registry.set_channel(name, "prod", {1: 100}, who="ana")
    return store


def behind(store: MemoryStore, name: str) -> ObjectRegistry:
    return ObjectRegistry(Guarded(store, Policy.read(name)))


def record(registry: ObjectRegistry, text: str) -> Record:
    return registry.resolve(AdapterRef.parse(text)).record


@pytest.mark.parametrize("name", POLICIES)
def test_whoever_reads_a_tenant_reads_all_of_it(store: MemoryStore, name: str, tmp_path: Path) -> None:
    registry = behind(store, name)
    for ref in (
        "acme/support",
        "acme/support@1",
        "acme/support@prod",
        f"acme/support@{record(registry, 'acme/support').digest}",
    ):
        Cache(tmp_path, registry).fetch(record(registry, ref))
    assert registry.adapters("acme") == [SUPPORT]
    assert fsck(registry, [SUPPORT]).is_clean
    assert registry.changes("acme").events
    registry.signatures(record(registry, "acme/support"))


@pytest.mark.parametrize("name", ["reader", "publisher"])
def test_one_tenant_sees_nothing_of_another(store: MemoryStore, name: str) -> None:
    registry = behind(store, name)
    for look in (
        lambda: record(registry, "beta/bot"),
        lambda: registry.adapters("beta"),
        lambda: registry.versions(THEIRS),
        lambda: registry.changes("beta"),
        lambda: registry.tenants(),
    ):
        with pytest.raises(StorageError, match="not allowed"):
            look()


@pytest.mark.parametrize("name", ["reader", "serving"])
def test_readers_write_nothing(store: MemoryStore, name: str, new_draft: Callable[[str], Draft]) -> None:
    registry = behind(store, name)
    before = dict(store._values)
    for write in (
        lambda: registry.publish(new_draft("new"), name=SUPPORT, author="mallory"),
        lambda: registry.set_channel(SUPPORT, "prod", {1: 100}, who="mallory"),
        lambda: registry.set_status(SUPPORT, 1, "yanked", who="mallory"),
        lambda: registry.add_evaluation(SUPPORT, 1, suite="x", metrics={}, who="mallory"),
        lambda: registry.store.delete("t/acme/a/support/v/999999999-1.json"),
    ):
        with pytest.raises(StorageError, match="not allowed"):
            write()
    assert store._values == before


def test_a_server_reads_all_tenants(store: MemoryStore, tmp_path: Path) -> None:
    registry = behind(store, "serving")
    assert registry.tenants() == ["acme", "beta"]
    Cache(tmp_path, registry).fetch(record(registry, "beta/bot@prod"))


def test_a_publisher_writes_its_tenant_and_no_other(
    store: MemoryStore, new_draft: Callable[[str], Draft], keys: dict[str, tuple[Path, Path]]
) -> None:
    registry = behind(store, "publisher")
    published = registry.publish(new_draft("new"), name=SUPPORT, author="ben")
    sign(registry, published, key=keys["ana"][0])
    registry.set_channel(SUPPORT, "prod", {2: 100}, who="ben")
    registry.rollback(SUPPORT, "prod", who="ben")
    registry.set_status(SUPPORT, 2, "yanked", who="ben")
    registry.add_evaluation(SUPPORT, 1, suite="x", metrics={}, who="ben")
    with pytest.raises(StorageError, match="not allowed"):
        registry.publish(new_draft("other"), name=THEIRS, author="mallory")


@pytest.mark.parametrize("name", ["publisher", "admin"])
def test_what_is_published_cannot_be_overwritten(store: MemoryStore, name: str) -> None:
    policy = Policy.read(name)
    conditional = {"s3:if-none-match": "*"}
    for key in (k for k in store.keys("") if k.startswith("t/acme/a/")):
        resource = f"arn:aws:s3:::bucket/{ROOT}/{key}"
        assert policy.allows("s3:PutObject", resource, conditional)
        assert not policy.allows("s3:PutObject", resource, {})
        assert name == "admin" or not policy.allows("s3:DeleteObject", resource, {})


def test_an_admin_proves_the_store_and_cleans_up(store: MemoryStore) -> None:
    prove(behind(store, "admin").store)
    with pytest.raises(StorageError):
        prove(behind(store, "publisher").store)
    registry = behind(store, "admin")
    registry.store.delete(*registry.store.keys("t/beta/"))
    assert registry.tenants() == ["acme"]


def test_an_admin_collects_and_deletes_and_a_publisher_does_not(
    store: MemoryStore, new_draft: Callable[[str], Draft]
) -> None:
    registry, publisher = behind(store, "admin"), behind(store, "publisher")
    registry.set_status(SUPPORT, 1, "deleted", who="ana")
    with pytest.raises(StorageError, match="not allowed"):
        collect(publisher, ["acme"], patience=Patience(young=-60))
    assert collect(registry, ["acme"], patience=Patience(young=-60)).freed == 1
    with pytest.raises(StorageError, match="not allowed"):
        publisher.delete_tenant("acme", who="mallory")
    registry.delete_tenant("acme", who="ana")
    with pytest.raises(Gone):
        publisher.publish(new_draft("new"), name=SUPPORT, author="ben")


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_reaches_beyond_the_registry(name: str) -> None:
    policy = Policy.read(name)
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        for key in ("models/registry2/t/acme/x", "models/x", "t/acme/x"):
            assert not policy.allows(action, f"arn:aws:s3:::bucket/{key}", {"s3:if-none-match": "*"})
    for prefix in ("", "models/", "t/acme/"):
        assert not policy.allows("s3:ListBucket", "arn:aws:s3:::bucket", {"s3:prefix": prefix})
    assert not policy.allows("s3:ListBucket", "arn:aws:s3:::bucket", {})
