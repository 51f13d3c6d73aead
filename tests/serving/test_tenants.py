"""Tenants and keys in the database, and the database locked, gone, replaced and migrated under a reader."""

from __future__ import annotations

import sqlite3
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapterhub.errors import AlreadyExists, NotFound, StorageError, Unauthorized, UsageError
from adapterhub.refs import AdapterName
from adapterhub.serving import database, schema
from adapterhub.serving.database import default_url, masked, open_database
from adapterhub.serving.tenants.callers import Limits
from adapterhub.serving.tenants.keys import Tenant
from adapterhub.serving.tenants.tenants import Tenants

DESK = AdapterName.parse("globex/desk")


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    tenants = Tenants(open_database(default_url(tmp_path)))
    tenants.add(Tenant("acme", limits=Limits(concurrency=4)))
    return tenants


def test_a_tenant_and_its_keys_come_back_as_they_went_in(tenants: Tenants) -> None:
    minted, key = tenants.add_key("acme", scopes={"inference", "admin"}, label="web", limits=Limits(output=9))
    assert tenants.keys("acme") == [key]
    caller = tenants.directory().caller(minted.text)
    assert (caller.tenant, caller.scopes) == ("acme", {"inference", "admin"})
    assert (caller.limits, caller.key_limits) == (Limits(concurrency=4), Limits(output=9))
    tenants.change(Tenant("acme", base=False, weight=3))
    assert tenants.tenant("acme").weight == 3 and tenants.tenant("acme").created
    assert not tenants.directory().caller(minted.text).base


def test_what_cannot_be(tenants: Tenants) -> None:
    with pytest.raises(AlreadyExists):
        tenants.add(Tenant("acme"))
    with pytest.raises(UsageError):
        tenants.add(Tenant("../x"))
    with pytest.raises(UsageError, match="admn is no scope"):
        tenants.add_key("acme", scopes=["admn"])  # type: ignore[list-item]
    for act in (
        lambda: tenants.add_key("nobody"),
        lambda: tenants.keys("nobody"),
        lambda: tenants.revoke("nokey"),
        lambda: tenants.remove("nobody"),
        lambda: tenants.share(DESK, "nobody"),
        lambda: tenants.unshare(DESK, "acme"),
    ):
        with pytest.raises(NotFound):
            act()


def test_a_key_ends_by_revocation_expiry_and_rotation(tenants: Tenants) -> None:
    now = datetime.now(UTC)
    first, key = tenants.add_key("acme")
    second, _ = tenants.rotate(key.id, old_until=now + timedelta(hours=1))
    assert tenants.directory().caller(first.text, now=now).key == key.id
    with pytest.raises(Unauthorized, match="expired"):
        tenants.directory().caller(first.text, now=now + timedelta(hours=2))
    tenants.revoke(second.id)
    with pytest.raises(Unauthorized, match="revoked"):
        tenants.directory().caller(second.text, now=now + timedelta(minutes=1))
    with pytest.raises(UsageError, match="revoked"):
        tenants.rotate(second.id, old_until=now)
    tenants.expire(key.id, None)
    assert tenants.directory().caller(first.text, now=now + timedelta(days=999)).tenant == "acme"


def test_a_tenant_goes_with_its_keys_and_shares(tenants: Tenants) -> None:
    minted, _ = tenants.add_key("acme")
    tenants.share(DESK, "acme")
    tenants.share(DESK, "acme")
    assert tenants.directory().caller(minted.text).may_use(DESK)
    tenants.remove("acme")
    assert not tenants.keys() and not tenants.shares()
    with pytest.raises(Unauthorized):
        tenants.directory().caller(minted.text)


def test_a_reader_sees_changes_and_else_reads_one_number(tenants: Tenants) -> None:
    assert tenants.changed() is not None
    assert tenants.changed() is None
    tenants.add_key("acme")
    assert tenants.changed() is not None


def test_only_its_owner_reads_the_file_and_no_text_of_a_key_is_in_it(tenants: Tenants, tmp_path: Path) -> None:
    minted, _ = tenants.add_key("acme")
    files = list(tmp_path.glob("adapterhub.db*"))
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
    assert all(minted.text.rsplit("_", 1)[1].encode() not in f.read_bytes() for f in files)


class TestFaults:
    def test_gone(self, tenants: Tenants, tmp_path: Path) -> None:
        for file in tmp_path.glob("adapterhub.db*"):
            file.unlink()
        with pytest.raises(StorageError):
            tenants.changed()
        assert not (tmp_path / "adapterhub.db").exists(), "a reader made a new one"

    def test_replaced_by_garbage(self, tenants: Tenants, tmp_path: Path) -> None:
        for file in tmp_path.glob("adapterhub.db-*"):
            file.unlink()
        (tmp_path / "adapterhub.db").write_bytes(b"x" * 10_000)
        with pytest.raises(StorageError):
            tenants.changed()
        with pytest.raises(StorageError):
            tenants.add_key("acme")

    def test_locked_readers_go_on_and_writers_are_told(
        self, tenants: Tenants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(database, "WAIT_SECONDS", 0.01)
        other = sqlite3.connect(tmp_path / "adapterhub.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert tenants.directory().tenants
        with pytest.raises(StorageError, match="locked"):
            tenants.add_key("acme")
        other.execute("ROLLBACK")
        other.close()
        tenants.add_key("acme")

    def test_migrated_underneath(self, tenants: Tenants, tmp_path: Path) -> None:
        """A newer program added a column and a table: servers read on, and writers are told to upgrade."""
        minted, _ = tenants.add_key("acme")
        with sqlite3.connect(tmp_path / "adapterhub.db") as other:
            other.execute("ALTER TABLE tenants ADD COLUMN novelty INTEGER")
            other.execute("CREATE TABLE novelties (id INTEGER)")
            other.execute("UPDATE alembic_version SET version_num = '9999'")
        other.close()
        assert tenants.directory().caller(minted.text).tenant == "acme"
        with pytest.raises(UsageError, match="newer"):
            tenants.add_key("acme")

    def test_migrated_so_that_nothing_fits(self, tenants: Tenants, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "adapterhub.db") as other:
            other.execute("ALTER TABLE keys RENAME COLUMN hash TO digest")
        other.close()
        with pytest.raises(StorageError):
            tenants.directory()


def test_the_migrations_make_the_schema(tmp_path: Path) -> None:
    url = default_url(tmp_path)
    with open_database(url).write() as connection:
        assert database.revision(connection) == database.HEAD
        inspector = sa.inspect(connection)
        for table in schema.metadata.sorted_tables:
            made = {(c["name"], c["nullable"], str(c["type"])) for c in inspector.get_columns(table.name)}
            assert made == {(c.name, c.nullable, c.type.compile(connection.dialect)) for c in table.columns}


@pytest.mark.parametrize("url", ["mysql://h/x", "sqlite://", "nonsense", "", "redis://x"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        open_database(url)


def test_passwords_are_not_shown() -> None:
    assert "secret" not in masked("postgresql://ana:secret@db.example/ah")
