"""`ah usage`, as it is typed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.tenants.tenants import Tenants
from adapterhub.serving.usage import Batch, Counts, Line, hour_of

Ah = Callable[..., Any]


@pytest.fixture
def booked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """acme and globex, an hour ago and 40 days ago."""
    url = default_url(tmp_path / "bill")
    monkeypatch.setenv("AH_DATABASE_URL", url)
    now = datetime.now(UTC)
    acme, globex = Line("acme", "k1", "acme/support", 3), Line("globex", "k2", "base", 0)
    rows = {
        (hour_of(now), acme): Counts(requests=2, tokens_in=10, tokens_out=4, resident_ms=2500),
        (hour_of(now), globex): Counts(requests=1),
        (hour_of(now - timedelta(days=40)), acme): Counts(requests=5),
    }
    Ledger(open_database(url)).book([Batch("w", 1, rows)])


def test_without_a_server_ever(ah: Ah) -> None:
    shown = ah("usage")
    assert (shown.code, shown.out) == (0, "") and "nothing was used" in shown.err
    assert ah("usage", "--json").json == []


@pytest.mark.usefixtures("booked")
def test_by_what_and_when(ah: Ah) -> None:
    assert [(e["tenant"], e["requests"]) for e in ah("usage", "--json").json] == [("acme", 2), ("globex", 1)]
    assert ah("usage", "--from", "90d", "--tenant", "acme", "--json").json[0]["requests"] == 7
    assert len(ah("usage", "--by", "day", "--from", "90d", "--json").json) == 2
    assert ah("usage", "--by", "version", "--json").json[0]["version"] == 3
    assert ah("usage", "--by", "key", "--from", "2020-01-01", "--to", "30d", "--json").json[0]["requests"] == 5
    table = ah("usage", "--by", "adapter").out
    assert table.splitlines()[0].split()[:2] == ["ADAPTER", "REQUESTS"] and "acme/support" in table
    rows = list(csv.DictReader(io.StringIO(ah("usage", "--by", "version", "--csv").out)))
    assert rows[0] | {"requests": "2"} == rows[0] and rows[0]["resident_seconds"] == "2.5"


def test_a_key_is_known_by_its_label(ah: Ah, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = default_url(tmp_path / "bill")
    monkeypatch.setenv("AH_DATABASE_URL", url)
    ah("tenant", "create", "acme")
    tenants = Tenants(open_database(url))
    keys = [tenants.add_key("acme", label=label)[1].id for label in ("the shop", "gone")]
    rows = {(hour_of(datetime.now(UTC)), Line("acme", key, "base", 0)): Counts(requests=1) for key in (*keys, "older")}
    Ledger(open_database(url)).book([Batch("w", 1, rows)])
    tenants.revoke(keys[1])  # and its bill goes on
    assert {e["key"]: e["label"] for e in ah("usage", "--by", "key", "--json").json} == {
        keys[0]: "the shop",
        keys[1]: "gone",
        "older": "",
    }
    table = ah("usage", "--by", "key").out.splitlines()
    assert table[0].split()[:3] == ["TENANT", "KEY", "LABEL"] and any("the shop" in line for line in table)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--by", "user"), "tenant, adapter, version, key, day"),
        (("--from", "yesterday"), "30d"),
        (("--from", "2026-13-01"), "is no time"),
        (("--from", "1d", "--to", "2d"), "there is nothing from"),
        (("--from", "2027-01-02", "--to", "2027-01-01"), "there is nothing from"),
        (("--csv", "--json"), "exclude each other"),
    ],
)
def test_what_cannot_be_right(ah: Ah, words: tuple[str, ...], said: str) -> None:
    refused = ah("usage", *words)
    assert refused.code == 2 and said in refused.err
