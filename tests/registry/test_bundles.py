"""Bundles: the same bytes each time, equal digests on the other side, and nothing taken from a hostile file."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.base import find_base
from adapterhub.errors import (
    AlreadyExists,
    BaseMismatch,
    Conflict,
    IntegrityError,
    StorageError,
    Unsupported,
    Untrusted,
)
from adapterhub.manifest import BaseFingerprint, Record, canonical_json
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Cache, Draft, ObjectRegistry, Registry, open_registry
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.moving.bundle_index import MAX_INDEX, Bundled
from adapterhub.registry.moving.bundles import bring, opened, read_index, unpack, version_folder, write
from adapterhub.registry.moving.copying import original
from adapterhub.registry.signing import Signers, sign

Drafts = Callable[..., Draft]
Keys = dict[str, tuple[Path, Path]]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def registry() -> ObjectRegistry:
    return ObjectRegistry(MemoryStore())


@pytest.fixture
def other() -> ObjectRegistry:
    return ObjectRegistry(MemoryStore())


@pytest.fixture
def records(registry: Registry, new_draft: Drafts, name: AdapterName, keys: Keys) -> list[Record]:
    """Two signed versions of acme/support that share a file, @2 in prod and measured."""
    found = []
    for text in ("one", "two"):
        record = registry.publish(new_draft(text), name=name, author="ana", labels={"team": "x"})
        sign(registry, record, key=keys["ana"][0])
        found.append(record)
    registry.set_channel(name, "prod", {2: 100}, who="ana")
    registry.add_evaluation(name, 2, suite="heldout", metrics={"score": 0.5}, who="eve")
    return found


def bundled(registry: Registry, *refs: str) -> list[Bundled]:
    parsed = [AdapterRef.parse(ref) for ref in refs]
    return [Bundled(original(registry, registry.resolve(ref)), ref.channel) for ref in parsed]


@pytest.fixture
def files(registry: Registry, tmp_path: Path) -> Callable[[Record], Path]:
    return Cache(tmp_path / "cache", registry).fetch


@pytest.fixture
def bundle(registry: Registry, records: list[Record], files: Callable[[Record], Path], tmp_path: Path) -> Path:
    write(tmp_path / "bundle.tar", bundled(registry, "acme/support@1", "acme/support@prod"), files=files)
    return tmp_path / "bundle.tar"


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────


def test_digests_are_equal_on_the_other_side(
    bundle: Path, records: list[Record], other: Registry, tmp_path: Path, keys: Keys
) -> None:
    signers = Signers.read([keys["ana"][1]])
    index = unpack(bundle, tmp_path / "unpacked", signers=signers)
    landed = bring(index, tmp_path / "unpacked", other, channels=True, who="site")
    assert [one.record.digest for one in landed] == [record.digest for record in records]
    second = other.resolve(AdapterRef.parse("acme/support@prod")).record
    assert (second.version, second.labels, second.author) == (2, {"team": "x"}, "ana")
    assert other.evaluations(second.name, 2)[0].metrics == {"score": 0.5}
    signers.require(other, second)
    other.fetch_file(second, WEIGHTS, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "two"
    again = bring(index, tmp_path / "unpacked", other, who="site")
    assert [one.is_new for one in again] == [False, False]


def test_the_same_versions_make_the_same_bytes(
    bundle: Path, registry: Registry, files: Callable[[Record], Path], tmp_path: Path
) -> None:
    write(tmp_path / "again.tar", bundled(registry, "acme/support@prod", "acme/support@1"), files=files)
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()
    assert read_index(bundle).id == read_index(tmp_path / "again.tar").id


def test_tar_can_list_it(bundle: Path) -> None:
    with tarfile.open(bundle) as tar:
        members = tar.getmembers()
    assert members[0].name == "bundle.json"
    assert len(members) == 1 + 3  # one content is in both versions
    assert all(m.isreg() and m.mtime == 0 and m.uid == 0 for m in members)


def test_numbers_can_be_kept(
    bundle: Path, other: Registry, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    index = unpack(bundle, tmp_path / "unpacked")
    other.publish(new_draft("mine"), name=name, author="ben")
    with pytest.raises(Conflict):
        bring(index, tmp_path / "unpacked", other, same_number=True, who="site")
    assert [one.record.version for one in bring(index, tmp_path / "unpacked", other, who="site")] == [2, 3]


def test_a_bundle_is_not_overwritten(bundle: Path, registry: Registry, files: Callable[[Record], Path]) -> None:
    before = bundle.read_bytes()
    with pytest.raises(AlreadyExists):
        write(bundle, bundled(registry, "acme/support@1"), files=files)
    assert bundle.read_bytes() == before
    assert sorted(p.name for p in bundle.parent.glob("*bundle*")) == ["bundle.tar"]


def test_signatures_are_checked_before_anything_is_unpacked(bundle: Path, tmp_path: Path, keys: Keys) -> None:
    with pytest.raises(Untrusted, match="another key"):
        unpack(bundle, tmp_path / "unpacked", signers=Signers.read([keys["ben"][1]]))
    assert not (tmp_path / "unpacked").exists()


# ── with the base ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def with_base(
    registry: Registry, records: list[Record], files: Callable[[Record], Path], tmp_path: Path, tiny_base: Path
) -> Path:
    write(tmp_path / "all.tar", bundled(registry, "acme/support@prod"), files=files, base=find_base(str(tiny_base)))
    return tmp_path / "all.tar"


def test_the_base_comes_along(with_base: Path, tmp_path: Path, tiny_base: Path) -> None:
    one = opened(with_base, tmp_path / "opened")
    assert one.base is not None
    assert find_base(str(one.base)).fingerprint == find_base(str(tiny_base)).fingerprint
    assert sorted(p.name for p in one.base.iterdir()) == sorted(p.name for p in tiny_base.iterdir())


def test_an_opened_bundle_is_a_registry(with_base: Path, tmp_path: Path, keys: Keys) -> None:
    one = opened(with_base, tmp_path / "opened", signers=Signers.read([keys["ana"][1]]))
    registry = open_registry(one.registry)
    record = registry.resolve(AdapterRef.parse("acme/support@prod")).record
    assert record.version == 2
    Cache(tmp_path / "other", registry, signers=Signers.read([keys["ana"][1]])).fetch(record)
    before = {p: p.stat().st_ino for p in (tmp_path / "opened").rglob("*")}
    assert opened(with_base, tmp_path / "opened") == one
    assert {p: p.stat().st_ino for p in (tmp_path / "opened").rglob("*")} == before  # nothing was done again
    with pytest.raises(Untrusted):
        opened(with_base, tmp_path / "opened", signers=Signers.read([keys["ben"][1]]))


def test_a_broken_bundle_leaves_nothing_behind(with_base: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(with_base.read_bytes()[:-5000])
    with pytest.raises(IntegrityError):
        opened(tmp_path / "cut.tar", tmp_path / "opened")
    assert list((tmp_path / "opened").iterdir()) == []


def test_the_base_may_be_left_in_the_bundle(with_base: Path, tmp_path: Path) -> None:
    unpack(with_base, tmp_path / "unpacked", with_base=False)
    assert [p.name for p in (tmp_path / "unpacked").iterdir()] == ["versions"]


def test_another_base_is_refused(
    registry: Registry,
    new_draft: Drafts,
    name: AdapterName,
    files: Callable[[Record], Path],
    tmp_path: Path,
    tiny_base: Path,
) -> None:
    draft = new_draft()
    elsewhere = BaseFingerprint("other", "1" * 64, "2" * 64, "3" * 64, "BF16", 1)
    registry.publish(replace(draft, manifest=replace(draft.manifest, base=elsewhere)), name=name, author="ana")
    with pytest.raises(BaseMismatch):
        write(tmp_path / "b.tar", bundled(registry, "acme/support@1"), files=files, base=find_base(str(tiny_base)))
    assert not (tmp_path / "b.tar").exists()


# ── hostile ──────────────────────────────────────────────────────────────────────────────────────────────────────


def parts(bundle: Path) -> tuple[dict[str, Any], list[tuple[tarfile.TarInfo, bytes]]]:
    with tarfile.open(bundle) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return json.loads(members[0][1]), members[1:]


def written(path: Path, index: Any, members: list[tuple[tarfile.TarInfo, bytes]], **options: Any) -> Path:
    head = index if isinstance(index, bytes) else canonical_json(index)
    with tarfile.open(path, "w", **({"format": tarfile.GNU_FORMAT} | options)) as tar:
        first = tarfile.TarInfo("bundle.json")
        first.size = len(head)
        tar.addfile(first, io.BytesIO(head))
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, data


Members = list[tuple[tarfile.TarInfo, bytes]]
HOSTILE: dict[str, Callable[[Members], Members]] = {
    "climbs": lambda m: [entry("../../etc/cron.d/x", b"x"), *m],
    "absolute": lambda m: [entry("/etc/cron.d/x", b"x"), *m],
    "link": lambda m: [entry(m[0][0].name, type=tarfile.SYMTYPE, linkname="/etc/passwd"), *m[1:]],
    "hard link": lambda m: [entry(m[0][0].name, type=tarfile.LNKTYPE, linkname="bundle.json"), *m[1:]],
    "device": lambda m: [entry(m[0][0].name, type=tarfile.CHRTYPE), *m[1:]],
    "folder": lambda m: [entry("blobs", type=tarfile.DIRTYPE), *m],
    "sparse": lambda m: [entry(m[0][0].name, type=tarfile.GNUTYPE_SPARSE), *m[1:]],
    "long name": lambda m: [entry("blobs/" + "a" * 300, b"x"), *m],
    "twice": lambda m: [m[0], *m],
    "other order": lambda m: m[::-1],
    "one missing": lambda m: m[1:],
    "last missing": lambda m: m[:-1],
    "one more": lambda m: [*m, entry("blobs/" + "f" * 64, b"x")],
    "other bytes": lambda m: [(m[0][0], bytes(len(m[0][1]))), *m[1:]],
    "shorter": lambda m: [entry(m[0][0].name, m[0][1][:-1]), *m[1:]],
    "longer": lambda m: [entry(m[0][0].name, m[0][1] + b"x"), *m[1:]],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_members_are_refused(bundle: Path, tmp_path: Path, how: str) -> None:
    index, members = parts(bundle)
    hostile = written(tmp_path / "hostile.tar", index, HOSTILE[how](members))
    with pytest.raises(IntegrityError):
        unpack(hostile, tmp_path / "unpacked" / "here")
    outside = [p for p in tmp_path.rglob("*") if p.name in {"x", "cron.d", "passwd"}]
    assert outside == []


def test_extended_headers_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Their sizes would have to be believed: a reader that takes them can be made to fill the memory."""
    index, members = parts(bundle)
    members[0][0].pax_headers = {"comment": "x" * 10_000}
    for how in (tarfile.PAX_FORMAT,):
        with pytest.raises(IntegrityError):
            unpack(written(tmp_path / "pax.tar", index, members, format=how), tmp_path / "unpacked")


def test_a_cut_or_changed_file_is_refused_wherever_it_is(bundle: Path, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    for cut in (0, 1, 511, 512, 600, len(whole) // 2, len(whole) - 1024, len(whole) - 1):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(IntegrityError):
            unpack(tmp_path / "cut.tar", tmp_path / "unpacked")
    for at in range(0, len(whole) - 1024, 997):
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path / "changed.tar").write_bytes(changed)
        try:
            index = unpack(tmp_path / "changed.tar", tmp_path / "unpacked")
        except (IntegrityError, Unsupported):
            continue
        # what is not hashed: padding, a header's other fields, a label of a record
        for one in index.versions:
            text = (version_folder(tmp_path / "unpacked", one.record) / WEIGHTS).read_text()
            assert text == {1: "one", 2: "two"}[one.record.version]


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b" + bytes(2000), b"PK" + bytes(2000), b"{}" * 2000, bytes(10240)])
def test_what_is_no_bundle_is_said(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(IntegrityError):
        read_index(tmp_path / "file")


def test_a_bundle_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        read_index(tmp_path / "nothing.tar")


def edited(index: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(index))
    place = found
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "something else"),
        (("versions",), None),
        (("versions", 0, "record"), {}),
        (("versions", 0, "record", "digest"), "sha256:" + "0" * 64),
        (("versions", 0, "record", "manifest", "files", 0, "path"), "../x"),
        (("versions", 0, "record", "manifest", "files", 0, "size"), -1),
        (("versions", 0, "record", "tenant"), ".."),
        (("versions", 0, "status"), "deleted"),
        (("versions", 0, "channel"), "../x"),
        (("versions", 0, "signatures", 0, "key"), "../../x"),
        (("versions", 0, "signatures", 0, "bundle"), "no base64!"),
        (("versions", 0, "evaluations"), [{}]),
        (("base",), {"name": "x", "files": [{"path": "../x.safetensors", "size": 1, "sha256": "a" * 64}]}),
        (("base",), {"name": "x", "files": [{"path": "a/b.json", "size": 1, "sha256": "a" * 64}]}),
        (("base",), {"name": "x", "files": [{"path": "model.bin", "size": 1, "sha256": "a" * 64}]}),
        (("base",), {"name": "x", "files": [{"path": "modeling_x.py", "size": 1, "sha256": "a" * 64}]}),
        (("base",), {"name": "x", "files": [{"path": "config.json", "size": 1, "sha256": "a" * 64}] * 2}),
        (("base",), {"files": []}),
    ],
    ids=lambda v: str(v)[:60],
)
def test_a_hostile_list_is_refused(bundle: Path, tmp_path: Path, path: Any, value: Any) -> None:
    index, members = parts(bundle)
    hostile = written(tmp_path / "hostile.tar", edited(index, *path, value=value), members)
    with pytest.raises(IntegrityError):
        unpack(hostile, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_sizes_that_lie_are_refused(bundle: Path, tmp_path: Path) -> None:
    index, members = parts(bundle)
    huge = {"name": "x", "files": [{"path": "model.safetensors", "size": 2**60, "sha256": "a" * 64}]}
    with pytest.raises(StorageError, match="does not fit"):
        unpack(written(tmp_path / "huge.tar", edited(index, "base", value=huge), members), tmp_path / "unpacked")
    sha256 = members[0][0].name.removeprefix("blobs/")
    two = {"name": "x", "files": [{"path": "model.safetensors", "size": 1, "sha256": sha256}]}
    with pytest.raises(IntegrityError, match="two sizes"):
        unpack(written(tmp_path / "two.tar", edited(index, "base", value=two), members), tmp_path / "unpacked")


def test_json_bombs_are_refused(bundle: Path, tmp_path: Path) -> None:
    _, members = parts(bundle)
    for head in (b"[" * 100_000, b" " * (MAX_INDEX + 1), b"", b"null", b"[]", b'{"kind": NaN}'):
        with pytest.raises(IntegrityError):
            read_index(written(tmp_path / "bomb.tar", head, members))


def test_a_newer_bundle_says_what_to_type(bundle: Path, tmp_path: Path) -> None:
    index, members = parts(bundle)
    with pytest.raises(Unsupported, match="newer") as error:
        read_index(written(tmp_path / "newer.tar", edited(index, "format", value=2), members))
    assert "upgrade" in error.value.hint
