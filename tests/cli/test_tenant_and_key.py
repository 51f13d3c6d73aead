"""`ah tenant` and `ah key`, as they are typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Ah = Callable[..., Any]


def test_from_a_tenant_to_a_key_that_is_printed_once(ah: Ah) -> None:
    assert ah("tenant", "create", "acme", "--requests-per-minute", 60).code == 0
    made = ah("key", "create", "acme", "--label", "web", "--expires", "90d")
    text = made.out.strip()
    assert made.code == 0 and text.startswith("ah_") and "this once" in made.err
    listed = ah("key", "ls", "acme", "--json")
    assert text not in listed.out and listed.json[0]["label"] == "web"
    assert ah("tenant", "show", "acme", "--json").json["keys"] == listed.json
    assert ah("key", "revoke", text).code == 0, "a whole key will do"
    assert ah("key", "ls", "--json").json[0]["revoked"]


def test_rotate_expire_share_and_delete(ah: Ah) -> None:
    ah("tenant", "create", "acme")
    key = ah("key", "create", "acme", "--scope", "admin", "--scope", "inference", "--json").json
    new = ah("key", "rotate", key["id"], "--overlap", "1h", "--json").json
    assert new["scopes"] == ["admin", "inference"] and new["key"] != key["key"]
    assert ah("key", "expire", new["id"], "never", "--json").json["expires"] is None
    assert ah("tenant", "share", "globex/desk", "acme").code == 0
    assert ah("tenant", "show", "acme", "--json").json["uses"] == ["globex/desk"]
    assert ah("tenant", "unshare", "globex/desk", "acme").code == 0
    assert ah("tenant", "delete", "acme").code == 2
    assert ah("tenant", "delete", "acme", "--yes").code == 0
    assert ah("tenant", "ls", "--json").json == []


def test_set_changes_what_is_named_alone(ah: Ah) -> None:
    ah("tenant", "create", "acme", "--concurrency", 4, "--output", 100)
    set_ = ah("tenant", "set", "acme", "--concurrency", "none", "--no-base", "--weight", 2, "--json").json
    assert (set_["base"], set_["weight"]) == (False, 2)
    assert (set_["limits"]["concurrency"], set_["limits"]["output"]) == (None, 100)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tenant", "create", "Acme"), "is not a tenant name"),
        (("tenant", "create", "acme2", "--concurrency", "-3"), "no limit"),
        (("tenant", "create", "acme2", "--tokens-per-minute", "many"), "is no number"),
        (("tenant", "create", "acme2", "--weight", "nan"), "no weight"),
        (("tenant", "create", "acme"), "ah tenant set acme"),
        (("tenant", "set", "acme"), "ah tenant set --help"),
        (("tenant", "show", "nobody"), "ah tenant ls"),
        (("tenant", "share", "acme/x", "acme"), "own"),
        (("key", "create", "nobody"), "no tenant 'nobody'"),
        (("key", "create", "acme", "--scope", "root"), "root is no scope"),
        (("key", "create", "acme", "--expires", "tomorrow"), "30d"),
        (("key", "create", "acme", "--expires", "999999w"), "too far"),
        (("key", "revoke", "nokey"), "ah key ls"),
    ],
)
def test_what_cannot_be_says_why(ah: Ah, words: tuple[str, ...], said: str) -> None:
    ah("tenant", "create", "acme")
    done = ah(*words)
    assert done.code == 2
    assert said in " ".join(done.err.split())


def test_a_database_of_another_kind(ah: Ah, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AH_DATABASE_URL", "mysql://ana:secret@db/ah")
    done = ah("tenant", "ls")
    assert done.code == 2 and "mysql" in done.err and "secret" not in done.err
