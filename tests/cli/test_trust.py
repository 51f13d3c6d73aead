"""Signed, and refused where it is not: as it is typed, and behind a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]
Keys = dict[str, tuple[Path, Path]]


@pytest.fixture
def published(ah: Ah, adapter_factory: Callable[..., Path]) -> Ah:
    assert ah("publish", adapter_factory(), "--name", "acme/support").code == 0
    return ah


def refused(done: Any, *said: str) -> None:
    assert (done.code, done.out) == (2, ""), done
    for text in said:
        assert text in done.err


def test_what_is_signed_can_be_pulled(published: Ah, keys: Keys, tmp_path: Path) -> None:
    ana, ben = keys["ana"], keys["ben"]
    refused(published("pull", "acme/support", "--require-signed-by", ana[1]), "nobody signed it")
    signed = published("sign", "acme/support@1", "--key", ana[0])
    assert signed.code == 0
    assert signed.out.startswith("acme/support@1  sha256:")
    assert published("pull", "acme/support", "--require-signed-by", ana[1]).code == 0
    both = ("--require-signed-by", ben[1], "--require-signed-by", ana[1])
    assert published("pull", "acme/support", *both, "--to", tmp_path / "pulled").code == 0
    refused(published("pull", "acme/support", "--require-signed-by", ben[1]), "another key")
    refused(published("pull", "acme/support", "--require-signed-by", ben[1], "--to", tmp_path / "other"), "another key")
    assert not (tmp_path / "other").exists()


def test_the_setting_holds_for_every_command(published: Ah, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AH_REQUIRE_SIGNED_BY", os.pathsep.join(str(keys[name][1]) for name in ("ben", "ana")))
    refused(published("pull", "acme/support"), "nobody signed it", "ah signatures")
    published("sign", "acme/support", "--key", keys["ana"][0])
    assert published("pull", "acme/support").code == 0
    monkeypatch.setenv("AH_REQUIRE_SIGNED_BY", "/nowhere.pub")
    refused(published("pull", "acme/support"), "/nowhere.pub", "cannot be read")


def test_a_publish_signs_before_the_channel_moves(ah: Ah, adapter_factory: Callable[..., Path], keys: Keys) -> None:
    command = ("publish", adapter_factory(), "--name", "acme/support", "--channel", "prod", "--sign")
    refused(ah(*command, keys["ana"][1]), "no private key")
    assert ah("ls", "--json").json == []  # nothing was published with a key that cannot sign
    assert ah(*command, keys["ana"][0]).code == 0
    assert ah("pull", "acme/support@prod", "--require-signed-by", keys["ana"][1]).code == 0


def test_a_key_with_a_password_opens_from_the_environment(
    published: Ah, key_writer: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = key_writer(tmp_path / "key", ec.generate_private_key(ec.SECP256R1()), password=b"open sesame")
    refused(published("sign", "acme/support", "--key", private), "AH_KEY_PASSWORD")
    monkeypatch.setenv("AH_KEY_PASSWORD", "open sesame")
    assert published("sign", "acme/support", "--key", private).code == 0
    assert published("pull", "acme/support", "--require-signed-by", public).code == 0


def test_who_signed_is_shown(published: Ah, keys: Keys) -> None:
    assert "nobody signed" in published("signatures", "acme/support").err
    for name in ("ana", "ben"):
        published("sign", "acme/support", "--key", keys[name][0])
    listed = published("signatures", "acme/support", "--require-signed-by", keys["ana"][1], "--json").json
    assert sorted((row["good"] for row in listed["signatures"]), key=str) == [None, True]
    assert "good, by ana.pub" in published("signatures", "acme/support", "--require-signed-by", keys["ana"][1]).out


def test_signatures_fail_where_none_is_good(published: Ah, keys: Keys) -> None:
    published("sign", "acme/support", "--key", keys["ben"][0])
    done = published("signatures", "acme/support", "--require-signed-by", keys["ana"][1])
    assert done.code == 2
    assert "another key" in done.err


def test_an_export_needs_the_signature_too(
    published: Ah, keys: Keys, tiny_base: Path, adapter_factory: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("--base", tiny_base, "--to", tmp_path / "model", "--require-signed-by", keys["ana"][1], "--plan")
    refused(published("export", "acme/support", *command), "nobody signed it")
    refused(published("export", adapter_factory("folder"), *command), "only versions of a registry are signed")
    published("sign", "acme/support", "--key", keys["ana"][0])
    assert published("export", "acme/support", *command).code == 0


def test_a_server_with_a_broken_key_does_not_start(ah: Ah, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text("no key")
    done = ah("serve", "--base", tiny_base, "--require-signed-by", tmp_path / "key.pub")
    refused(done, "is no public key", "openssl")
