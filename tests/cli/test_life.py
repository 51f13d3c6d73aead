"""`ah gc`, `ah retain` and `ah delete-tenant` as they are typed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]


@pytest.fixture
def published(ah: Ah, adapter_factory: Callable[..., Path]) -> Ah:
    """acme/support@1 to @3, of which @1 is deleted and @2 in prod."""
    for seed in (1, 2, 3):
        folder = adapter_factory(f"a{seed}", seed=seed)
        assert ah("publish", folder, "--name", "acme/support").code == 0
    assert ah("channel", "set", "acme/support", "prod", "2").code == 0
    assert ah("delete", "acme/support@1", "--yes").code == 0
    return ah


def test_a_dry_run_explains_and_changes_nothing(published: Ah) -> None:
    done = published("gc", "--dry-run")
    assert done.code == 0
    assert "stored less than 24 hours ago" in done.out
    assert "0 blobs with 0 B would be freed" in done.err
    done = published("gc", "acme", "--dry-run", "--older-than", "0m")
    lines = done.out.splitlines()
    assert lines[0].split() == ["TENANT", "BLOB", "SIZE", "PINNED", "BY"]
    assert lines[1].endswith("nothing: goes")
    assert lines[2].endswith(("acme/support@2", "acme/support@3", "acme/support@3, acme/support@2"))
    assert "1 blobs" in done.err
    report = published("gc", "--dry-run", "--older-than", "0m", "--json").json
    assert (report["dry_run"], report["freed"]) == (True, 1)


def test_what_nothing_needs_goes(published: Ah) -> None:
    size = published("gc", "--older-than", "0m", "--json").json["freed_size"]
    assert size > 1000
    assert published("gc", "--older-than", "0m").err.startswith("0 blobs")
    assert published("fsck").code == 0


def test_rules_are_shown_and_then_applied(published: Ah) -> None:
    shown = published("retain", "acme", "--last", "1", "--days", "0")
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["acme/support@3", "keep"],
        ["acme/support@2", "keep"],
    ]
    assert "the channel prod points at it" in shown.out
    published("channel", "set", "acme/support", "prod", "3")
    shown = published("retain", "acme/support", "--last", "1", "--days", "0")
    assert "1 versions would be deleted; --yes" in shown.err
    assert published("show", "acme/support@2", "--json").json["status"] == "active"
    done = published("retain", "acme/support", "--last", "1", "--days", "0", "--yes", "--json").json
    assert {one["version"]: one["keep"] for one in done["versions"]} == {3: True, 2: False}
    assert published("show", "acme/support@2", "--json").json["status"] == "deleted"


def test_a_tenant_is_deleted_by_its_name_twice(published: Ah, adapter_factory: Callable[..., Path]) -> None:
    for words in ((), ("--confirm", "acm")):
        done = published("delete-tenant", "acme", *words)
        assert done.code == 2
        assert "acme has 1 adapters with 3 versions" in done.err
        assert "--confirm acme" in done.err
    assert published("delete-tenant", "acme", "--confirm", "acme", "--why", "left").out.startswith("acme is deleted")
    root = Path(os.environ["AH_HOME"]) / "registry"
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.parent != root)
    assert left == ["gone/acme.json"]
    done = published("publish", adapter_factory("again"), "--name", "acme/bot")
    assert done.code == 2
    assert "the tenant 'acme' was deleted" in done.err
    assert published("ls").out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("gc", "nobody"), "no tenant 'nobody'"),
        (("gc", "No Body"), "is not a tenant name"),
        (("gc", "--older-than", "soon"), "is no time"),
        (("gc", "--forget", "x"), "no publish 'x' is under way"),
        (("gc", "--registry", "hf://acme", "--forget", "x"), "waits for no publish"),
        (("retain", "nobody"), "no tenant 'nobody'"),
        (("retain", "acme/support@3"), "is not a"),
        (("retain", "acme", "--last", "0"), "would keep nothing"),
        (("delete-tenant", "nobody", "--confirm", "nobody"), "no tenant 'nobody'"),
        (("delete-tenant", "acme/support"), "is not a tenant name"),
    ],
)
def test_what_cannot_be_is_said(ah: Ah, words: tuple[str, ...], said: str) -> None:
    done = ah(*words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "next:" in done.err or "why:" in done.err
