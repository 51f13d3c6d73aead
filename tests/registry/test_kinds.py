"""What is done with registries works with every kind of them: signed, checked, copied, mirrored, bundled, fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import Conflict, Untrusted
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Cache, Draft, ObjectRegistry, Registry
from adapterhub.registry.fsck import fsck
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.moving.bundle_index import Bundled
from adapterhub.registry.moving.bundles import bring, unpack, write
from adapterhub.registry.moving.copying import land, original
from adapterhub.registry.moving.mirror import mirror
from adapterhub.registry.signing import Signers, sign

PROD = AdapterRef.parse("acme/support@prod")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def registry(every_registry: Registry) -> Registry:
    return every_registry


@pytest.fixture
def signers(keys: dict[str, tuple[Path, Path]]) -> Signers:
    return Signers.read([keys["ana"][1]])


@pytest.fixture
def published(
    registry: Registry, new_draft: Callable[..., Draft], name: AdapterName, keys: dict[str, tuple[Path, Path]]
) -> Registry:
    """acme/support@1, signed, measured and in prod."""
    record = registry.publish(new_draft("weights"), name=name, author="ana", labels={"team": "x"})
    sign(registry, record, key=keys["ana"][0])
    registry.add_evaluation(name, 1, suite="heldout", metrics={"score": 0.5}, who="eve")
    registry.set_channel(name, "prod", {1: 100}, who="ana")
    return registry


def check(registry: Registry, signers: Signers, folder: Path) -> None:
    """It has the version, with all that belongs to it."""
    record = registry.resolve(PROD).record
    assert (Cache(folder, registry, signers=signers).fetch(record) / WEIGHTS).read_text() == "weights"
    assert registry.evaluations(record.name, record.version)[0].metrics == {"score": 0.5}
    assert record.labels == {"team": "x"}
    assert fsck(registry).is_clean


def test_a_mirror_there_and_back(published: Registry, signers: Signers, tmp_path: Path) -> None:
    site, back = ObjectRegistry(MemoryStore()), ObjectRegistry(MemoryStore())
    mirror(published, site, files=Cache(tmp_path / "1", published, signers=signers).fetch)
    check(site, signers, tmp_path / "site")
    mirror(site, back, files=Cache(tmp_path / "2", site).fetch)
    check(back, signers, tmp_path / "back")
    assert mirror(back, published, files=Cache(tmp_path / "3", back).fetch).changed == 0


def test_a_copy_from_elsewhere(
    registry: Registry, new_draft: Callable[..., Draft], name: AdapterName, tmp_path: Path, signers: Signers
) -> None:
    elsewhere = ObjectRegistry(MemoryStore())
    elsewhere.publish(new_draft("weights"), name=name, author="ana")
    one = original(elsewhere, elsewhere.version(name, 1))
    for new in (True, False):
        landed = land(one, Cache(tmp_path / "cache", elsewhere).fetch, registry)
        assert (landed.is_new, landed.record.digest) == (new, one.record.digest)
    with pytest.raises(Untrusted):
        Cache(tmp_path / "strict", registry, signers=signers).fetch(landed.record)


def test_a_copy_that_keeps_its_number(
    registry: Registry, new_draft: Callable[..., Draft], name: AdapterName, tmp_path: Path
) -> None:
    elsewhere = ObjectRegistry(MemoryStore())
    for text in ("one", "two", "three"):
        elsewhere.publish(new_draft(text), name=name, author="ana")
    files = Cache(tmp_path / "cache", elsewhere).fetch
    for number in (2, 2, 3):
        one = original(elsewhere, elsewhere.version(name, number))
        landed = land(one, files, registry, number=number)
        assert (landed.record.version, landed.record.digest) == (number, one.record.digest)
    with pytest.raises(Conflict):  # numbers only grow
        land(original(elsewhere, elsewhere.version(name, 1)), files, registry, number=1)
    with pytest.raises(Conflict):  # taken by another content
        land(original(elsewhere, elsewhere.version(name, 1)), files, registry, number=3)
    assert registry.numbers(name) == [3, 2]


def test_a_bundle_there_and_back(published: Registry, signers: Signers, tmp_path: Path) -> None:
    one = Bundled(original(published, published.resolve(PROD)), "prod")
    write(tmp_path / "b.tar", [one], files=Cache(tmp_path / "1", published).fetch)
    index = unpack(tmp_path / "b.tar", tmp_path / "unpacked", signers=signers)
    site = ObjectRegistry(MemoryStore())
    bring(index, tmp_path / "unpacked", site, channels=True, who="site")
    check(site, signers, tmp_path / "site")
    assert not bring(index, tmp_path / "unpacked", published, who="site")[0].is_new


def test_fsck_finds_a_wrong_byte(published: Registry) -> None:
    if not isinstance(published, ObjectRegistry):
        pytest.skip("its bytes are out of reach")
    blob = max(published.store.entries("t/acme/blobs/"), key=lambda entry: entry.size).key
    published.store.delete(blob)
    published.store.create(blob, b"weightX")
    (problem,) = fsck(published).problems
    assert problem.where == f"acme/support@1 {WEIGHTS}"
