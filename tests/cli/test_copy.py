"""`ah copy` and `ah mirror` as they are typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]


@pytest.fixture
def published(ah: Ah, adapter_factory: Callable[..., Path]) -> Ah:
    for number in (1, 2):
        adapter = adapter_factory(f"a{number}", seed=number)
        assert ah("publish", adapter, "--name", "acme/support", "--label", "team=x", "--channel", "canary").code == 0
    return ah


def test_a_promotion_from_dev_to_prod(published: Ah, tmp_path: Path) -> None:
    prod = (tmp_path / "prod").as_uri()
    done = published("copy", "acme/support@canary", prod, "--channel", "prod")
    assert done.code == 0
    assert done.out.startswith("acme/support@1  sha256:")
    there = published("show", "acme/support@prod", "--registry", prod, "--json").json
    here = published("show", "acme/support@canary", "--json").json
    assert (there["digest"], there["manifest"], there["labels"]) == (here["digest"], here["manifest"], here["labels"])
    again = published("copy", "acme/support@canary", prod, "--channel", "prod")
    assert again.out.endswith("was there\n")
    assert len(published("channel", "log", "acme/support", "prod", "--registry", prod, "--json").json) == 1
    assert published("pull", "acme/support@prod", "--registry", prod, "--to", tmp_path / "pulled").code == 0


def test_numbers_and_names_can_be_chosen(published: Ah, tmp_path: Path) -> None:
    prod = (tmp_path / "prod").as_uri()
    copied = published("copy", "acme/support@2", prod, "--same-number", "--json").json
    assert (copied["ref"], copied["new"], copied["from"]) == ("acme/support@2", True, "acme/support@2")
    assert published("copy", "acme/support@2", prod, "--name", "beta/bot").out.startswith("beta/bot@1")
    taken = published("copy", "acme/support@1", prod, "--same-number")
    assert (taken.code, taken.out) == (2, "")
    assert published("fsck", "--registry", prod).code == 0


def test_a_mirror_follows(published: Ah, tmp_path: Path) -> None:
    home = published("ls", "--json")
    assert home.code == 0
    source, target = (
        published("copy", "acme/support", tmp_path / "source", "--json").json["registry"],
        tmp_path / "site",
    )
    done = published("mirror", source, target, "acme")
    assert done.out.startswith("1 versions, 0 statuses, 0 channels")
    assert published("mirror", source, target, "--json").json["versions"] == 0
    assert published("pull", "acme/support@1", "--registry", target, "--to", tmp_path / "pulled").code == 0


def test_a_diverged_target_is_refused(published: Ah, tmp_path: Path, adapter_factory: Callable[..., Path]) -> None:
    target = tmp_path / "site"
    published("publish", adapter_factory("own", seed=9), "--name", "acme/support", "--registry", target)
    source = published("copy", "acme/support", tmp_path / "source", "--json").json["registry"]
    done = published("mirror", source, target)
    assert done.code == 2
    assert "has diverged" in done.err
    assert "acme/support@1 is another version in the target" in done.err
