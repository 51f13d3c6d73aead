"""`ah bundle` and `ah import` as they are typed, and a model that is made of a bundle and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]
Keys = dict[str, tuple[Path, Path]]


@pytest.fixture
def published(ah: Ah, adapter_factory: Callable[..., Path], tiny_base: Path, keys: Keys) -> Ah:
    adapter = adapter_factory()
    command = ("--name", "acme/support", "--base", tiny_base, "--channel", "prod", "--sign", keys["ana"][0])
    assert ah("publish", adapter, *command).code == 0
    return ah


def refused(done: Any, *said: str, code: int = 2) -> None:
    assert (done.code, done.out) == (code, ""), done
    for text in said:
        assert text in done.err


def test_a_version_goes_to_another_site(published: Ah, tmp_path: Path, keys: Keys) -> None:
    packed = published("bundle", "acme/support@prod", "--to", tmp_path / "b.tar", "--json").json
    assert [one["ref"] for one in packed["versions"]] == ["acme/support@1"]
    site = ("--registry", tmp_path / "site")
    refused(published("import", tmp_path / "b.tar", *site, "--require-signed-by", keys["ben"][1]), "another key")
    done = published("import", tmp_path / "b.tar", *site, "--require-signed-by", keys["ana"][1], "--channels")
    assert done.out == f"acme/support@1  {packed['versions'][0]['digest']}\n"
    assert published("pull", "acme/support@prod", *site, "--require-signed-by", keys["ana"][1]).code == 0
    assert published("import", tmp_path / "b.tar", *site).out.endswith("was there\n")
    assert published("fsck", *site).code == 0


@pytest.mark.slow
def test_an_export_needs_nothing_but_the_bundle(
    published: Ah, tmp_path: Path, tiny_base: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    packed = published("bundle", "acme/support", "--with-base", "--base", base, "--to", tmp_path / "all.tar")
    assert packed.code == 0
    shutil.rmtree(base)
    monkeypatch.setenv("AH_HOME", str(tmp_path / "air-gapped"))
    command = ("export", "acme/support@1", "--bundle", tmp_path / "all.tar", "--to", tmp_path / "model")
    refused(published(*command, "--require-signed-by", keys["ben"][1]), "another key")
    assert published(*command, "--require-signed-by", keys["ana"][1]).code == 0
    assert published("verify", tmp_path / "model").code == 0
    refused(published(*command, "--registry", tmp_path / "other"), "two registries")


def test_the_base_is_taken_out_where_it_is_wanted(published: Ah, tmp_path: Path, tiny_base: Path) -> None:
    published("bundle", "acme/support", "--with-base", "--base", tiny_base, "--to", tmp_path / "all.tar")
    site = ("--registry", tmp_path / "site")
    assert "--base-to" in published("import", tmp_path / "all.tar", *site).err
    assert published("import", tmp_path / "all.tar", *site, "--base-to", tmp_path / "model").code == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()
    refused(published("import", tmp_path / "all.tar", *site, "--base-to", tmp_path / "model"), "is there already")
    assert [p.name for p in tmp_path.glob(".bundle*")] == []


def test_what_does_not_go_together_is_said(published: Ah, tmp_path: Path, tiny_base: Path) -> None:
    to = ("--to", tmp_path / "b.tar")
    refused(published("bundle", "acme/support", "--with-base", *to), "--with-base needs --base")
    refused(published("bundle", "acme/support", "--base", tiny_base, *to), "--with-base alone")
    refused(published("bundle", "acme/nothing", *to), "no adapter")
    assert published("bundle", "acme/support", *to).code == 0
    refused(published("bundle", "acme/support", *to), "is there already")
    refused(published("import", tmp_path / "b.tar", "--base-to", tmp_path / "model"), "brings no base")
    (tmp_path / "text").write_text("no bundle")
    refused(published("import", tmp_path / "text"), code=1)
    refused(published("serve", "--bundle", tmp_path / "b.tar"), "no base model was named")
