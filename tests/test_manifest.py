from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import IntegrityError, Unsupported
from adapterhub.manifest import (
    BaseFingerprint,
    FileEntry,
    Lineage,
    LoraShape,
    Manifest,
    Record,
    Verdict,
    Verdicts,
    canonical_json,
)
from adapterhub.refs import AdapterName

BASE = BaseFingerprint("tiny", "1" * 64, "2" * 64, "3" * 64, "BF16", 1000, commit=None)

files = st.builds(
    FileEntry,
    path=st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?\.json", fullmatch=True),
    size=st.integers(0, 2**40),
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
manifests = st.builds(
    Manifest,
    files=st.lists(files, min_size=1, max_size=4, unique_by=lambda f: f.path).map(
        lambda found: tuple(sorted(found, key=lambda f: f.path))
    ),
    lora=st.builds(
        LoraShape,
        rank=st.integers(1, 512),
        alpha=st.floats(0.1, 1000),
        target_modules=st.lists(st.text(max_size=8), max_size=3).map(tuple),
        parameters=st.integers(1, 10**9),
        dtype=st.sampled_from(["F32", "BF16"]),
    ),
    base=st.none() | st.just(BASE),
    lineage=st.builds(
        Lineage,
        method=st.text(max_size=5),
        metrics=st.dictionaries(st.text(max_size=5), st.floats(-10, 10), max_size=2),
    ),
)


def record(manifest: Manifest) -> Record:
    yes = Verdict("yes")
    return Record(
        name=AdapterName("acme", "support"),
        version=3,
        digest=manifest.digest,
        manifest=manifest,
        publish_id="x",
        created="2026-01-01T00:00:00+00:00",
        author="ana",
        verdicts=Verdicts(yes, yes, Verdict("unknown", "no base", "vllm 0.32")),
        labels={"team": "ü"},
    )


def a_manifest() -> Manifest:
    return Manifest(
        files=(FileEntry("a.json", 3, "a" * 64),), lora=LoraShape(4, 8.0, ("q_proj",), 10, "F32"), base=BASE
    )


def rewritten(data: bytes, **changes: Any) -> bytes:
    return canonical_json(json.loads(data) | changes)


@given(manifests)
def test_a_record_is_read_back_as_it_was_written(manifest: Manifest) -> None:
    written = record(manifest)
    read = Record.from_bytes(written.to_bytes())
    assert read == written
    assert read.to_bytes() == written.to_bytes()
    assert read.digest == manifest.digest


def test_the_digest_is_that_of_the_content_alone() -> None:
    one, two = record(a_manifest()), replace(record(a_manifest()), version=9, author="ben", labels={})
    assert one.digest == two.digest
    other = replace(a_manifest(), files=(FileEntry("a.json", 3, "b" * 64),))
    assert other.digest != one.digest


def test_the_order_of_files_does_not_matter() -> None:
    first, second = FileEntry("a.json", 1, "a" * 64), FileEntry("b.json", 2, "b" * 64)
    assert replace(a_manifest(), files=(first, second)).digest == replace(a_manifest(), files=(second, first)).digest


def test_fields_of_a_newer_program_are_kept() -> None:
    raw = a_manifest().to_json() | {"colour": "blue"}
    manifest = Manifest.from_json(raw)
    assert manifest.to_json()["colour"] == "blue"
    assert manifest.digest == Manifest.from_json(json.loads(manifest.to_bytes())).digest
    written = record(manifest)
    assert Record.from_bytes(written.to_bytes()).to_bytes() == written.to_bytes()


def test_a_newer_format_is_refused_with_what_to_type() -> None:
    with pytest.raises(Unsupported, match="newer") as refused:
        Record.from_bytes(rewritten(record(a_manifest()).to_bytes(), format=2))
    assert "upgrade" in refused.value.hint


def test_a_changed_manifest_does_not_match_its_digest() -> None:
    data = record(a_manifest()).to_bytes()
    changed = json.loads(data)["manifest"] | {"tokenizer_sha256": "f" * 64}
    with pytest.raises(IntegrityError, match="does not match its digest"):
        Record.from_bytes(rewritten(data, manifest=changed))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"1", b"null", b"{}", b'{"format": 1}', b"\xff\xfe"])
def test_broken_records_are_named_so(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Record.from_bytes(data)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "a\0b",
        "..",
        "C:\\x",
        "C:x",
        "a:stream",
        "a.",
        "a ",
        "b./a",
        "\n",
    ],
)
def test_no_file_of_a_manifest_leaves_its_folder(path: str) -> None:
    with pytest.raises(IntegrityError):
        FileEntry(path, 1, "a" * 64)
    raw = a_manifest().to_json()
    raw["files"][0]["path"] = path
    with pytest.raises(IntegrityError):
        Manifest.from_json(raw)


@pytest.mark.parametrize(
    "paths", [("a.json", "a.json"), ("a.json", "A.json"), ("a", "a/b"), ("a/b/c", "a/B"), ("straße", "strasse")]
)
def test_no_two_files_share_a_place(paths: tuple[str, str]) -> None:
    files = tuple(FileEntry(path, 1, "a" * 64) for path in paths)
    with pytest.raises(IntegrityError, match="two files"):
        replace(a_manifest(), files=files)
    raw = a_manifest().to_json() | {"files": [{"path": p, "size": 1, "sha256": "a" * 64} for p in paths]}
    with pytest.raises(IntegrityError, match="two files"):
        Manifest.from_json(raw)


@pytest.mark.parametrize("size", [-1, 1.5, "1", None, True])
def test_a_size_is_a_number_of_bytes(size: Any) -> None:
    raw = a_manifest().to_json()
    raw["files"][0]["size"] = size
    with pytest.raises(IntegrityError):
        Manifest.from_json(raw)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "3"},
        {"version": 0},
        {"version": None},
        {"tenant": ".."},
        {"adapter": 1},
        {"labels": 1},
        {"digest": 1},
    ],
    ids=str,
)
def test_a_record_with_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        Record.from_bytes(rewritten(record(a_manifest()).to_bytes(), **changes))


def test_json_bombs_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(IntegrityError, match="too large"):
        Record.from_bytes(b'{"format": 1, "x": "' + b"x" * 100_000_000 + b'"}')
    for deep in (b"[" * 100_000, b'{"format":1,"manifest":' * 20_000, b'{"format": ' + b"9" * 100_000 + b"}"):
        with pytest.raises(IntegrityError):
            Record.from_bytes(deep)
    nested: Any = 1
    for _ in range(sys.getrecursionlimit() * 2 // 3):
        nested = {"a": nested}
    with pytest.raises(IntegrityError):  # may be read, and yet be too deep to be hashed
        Record.from_bytes(
            rewritten(record(a_manifest()).to_bytes(), digest="x", manifest=a_manifest().to_json() | {"deep": nested})
        )


@pytest.mark.parametrize("sha256", ["", "a" * 63, "../" * 21 + "x", "A" * 64, "a" * 63 + "\n"])
def test_a_hash_that_could_be_a_path_is_refused(sha256: str) -> None:
    with pytest.raises(IntegrityError):
        FileEntry("a.json", 1, sha256)


def test_bases_match_exactly_or_in_another_dtype_or_not() -> None:
    assert BASE.match(replace(BASE, name="a copy", commit="c")) == "exact"
    assert BASE.match(replace(BASE, content="9" * 64, dtype="F32")) == "dtype"
    assert BASE.match(replace(BASE, content="9" * 64)) == "mismatch"
    assert BASE.match(replace(BASE, content="9" * 64, values="9" * 64, dtype="F32")) == "mismatch"
    assert BASE.match(replace(BASE, layout="9" * 64)) == "mismatch"
