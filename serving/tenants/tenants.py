"""Tenants, keys and shares in the database: what `ah tenant` and `ah key` change, and running servers read.

tenants = Tenants(open_database(url))
tenants.add(Tenant("acme"))
minted = tenants.add_key("acme", scopes={"inference"})      # minted.text is known here and nowhere else
tenants.directory()                                          # everything, as a server wants it
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from adapterhub.errors import AlreadyExists, NotFound, UsageError
from adapterhub.refs import AdapterName, check_tenant
from adapterhub.serving.database import Database
from adapterhub.serving.schema import LIMITS, generation, keys, shares, tenants
from adapterhub.serving.tenants.callers import NO_LIMITS, SCOPES, Limits, Scope
from adapterhub.serving.tenants.keys import Directory, Key, Minted, Share, Tenant, mint

_INFERENCE: frozenset[Scope] = frozenset({"inference"})
_FULL_LOOK = 30  # every so many looks all is read, whatever the generation says: the file may be another one


class Tenants:
    """The tables, by concept. Every method is one transaction; all raise StorageError."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: int | None = None  # the generation that `changed` returned last
        self._looks = 0

    # ── tenants ──────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, tenant: Tenant) -> Tenant:
        """Raises InvalidName, AlreadyExists."""
        check_tenant(tenant.name)
        created = replace(tenant, created=_now())
        with self._write() as connection:
            if _row(connection, tenants, tenants.c.name == tenant.name) is not None:
                raise AlreadyExists(
                    f"the tenant {tenant.name} exists already", hint=f"ah tenant set {tenant.name} --help"
                )
            connection.execute(tenants.insert().values(**_tenant_values(created)))
        return created

    def change(self, tenant: Tenant) -> None:
        """Everything but its name and its creation. Raises NotFound."""
        with self._write() as connection:
            values = _tenant_values(tenant)
            del values["created"]
            done = connection.execute(tenants.update().where(tenants.c.name == tenant.name).values(**values))
            _expect_one(done.rowcount, tenant.name)

    def remove(self, name: str) -> None:
        """With its keys and what is shared with it. Raises NotFound."""
        with self._write() as connection:
            _expect_one(connection.execute(tenants.delete().where(tenants.c.name == name)).rowcount, name)

    def tenant(self, name: str) -> Tenant:
        """Raises NotFound."""
        with self._database.read() as connection:
            row = _row(connection, tenants, tenants.c.name == name)
        if row is None:
            raise _no_tenant(name)
        return _tenant(row)

    def list(self) -> list[Tenant]:
        """By name."""
        with self._database.read() as connection:
            return [_tenant(row) for row in connection.execute(sa.select(tenants).order_by(tenants.c.name)).mappings()]

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────

    def add_key(
        self,
        tenant: str,
        *,
        scopes: Collection[Scope] = _INFERENCE,
        label: str = "",
        limits: Limits = NO_LIMITS,
        expires: datetime | None = None,
    ) -> tuple[Minted, Key]:
        """Raises NotFound (the tenant), UsageError (no or an unknown scope)."""
        if not scopes or (unknown := set(scopes) - SCOPES):
            wrong = ", ".join(sorted(unknown)) if scopes else "nothing"
            raise UsageError(f"{wrong} is no scope", why=f"a key needs one or more of {', '.join(sorted(SCOPES))}")
        with self._write() as connection:
            if _row(connection, tenants, tenants.c.name == tenant) is None:
                raise _no_tenant(tenant)
            return _insert_key(connection, tenant, frozenset(scopes), label, limits, expires)

    def rotate(self, key_id: str, *, old_until: datetime) -> tuple[Minted, Key]:
        """A new key in place of one, which goes on until then. Raises NotFound, UsageError where that has ended."""
        with self._write() as connection:
            old = _key(connection, key_id)
            if problem := old.problem(datetime.now(UTC)):
                raise UsageError(f"the key {key_id} cannot be rotated", why=problem, hint=f"ah key create {old.tenant}")
            expires = datetime.fromisoformat(old.expires) if old.expires else None
            made = _insert_key(connection, old.tenant, old.scopes, old.label, old.limits, expires)
            until = min(filter(None, (old_until, expires)))
            connection.execute(keys.update().where(keys.c.id == key_id).values(expires=_iso(until)))
            return made

    def expire(self, key_id: str, when: datetime | None) -> Key:
        """At a moment, or never (None). Raises NotFound."""
        return self._end(key_id, expires=_iso(when) if when else None)

    def revoke(self, key_id: str) -> Key:
        """Now and for ever. Raises NotFound."""
        return self._end(key_id, revoked=_now())

    def keys(self, tenant: str | None = None) -> Collection[Key]:
        """By tenant and age. Raises NotFound."""
        found = sa.select(keys).order_by(keys.c.tenant, keys.c.created, keys.c.id)
        with self._database.read() as connection:
            if tenant is not None:
                if _row(connection, tenants, tenants.c.name == tenant) is None:
                    raise _no_tenant(tenant)
                found = found.where(keys.c.tenant == tenant)
            return [_as_key(row) for row in connection.execute(found).mappings()]

    def _end(self, key_id: str, **values: str | None) -> Key:
        with self._write() as connection:
            _key(connection, key_id)
            connection.execute(keys.update().where(keys.c.id == key_id).values(**values))
            return _key(connection, key_id)

    # ── shares ───────────────────────────────────────────────────────────────────────────────────────────────

    def share(self, adapter: AdapterName, tenant: str) -> None:
        """Again is the same. Raises NotFound."""
        with self._write() as connection:
            if _row(connection, tenants, tenants.c.name == tenant) is None:
                raise _no_tenant(tenant)
            connection.execute(shares.delete().where(_is(adapter, tenant)))
            connection.execute(shares.insert().values(tenant=tenant, adapter=str(adapter)))

    def unshare(self, adapter: AdapterName, tenant: str) -> None:
        """Raises NotFound."""
        with self._write() as connection:
            if not connection.execute(shares.delete().where(_is(adapter, tenant))).rowcount:
                raise NotFound(f"{adapter} is not shared with {tenant}", hint=f"ah tenant show {tenant}")

    def shares(self) -> Collection[Share]:
        with self._database.read() as connection:
            return _shares(connection)

    # ── for servers ──────────────────────────────────────────────────────────────────────────────────────────

    def directory(self) -> Directory:
        """All of it, at one moment."""
        with self._database.read() as connection:
            return _directory(connection)

    def changed(self) -> Directory | None:
        """`directory` where something changed since the last call, or that was long ago; else None."""
        with self._database.read() as connection:
            number = connection.execute(sa.select(generation.c.number)).scalar_one()
            self._looks += 1
            if number == self._known and self._looks % _FULL_LOOK:
                return None
            found = _directory(connection)
            self._known = number
            return found

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._database.write() as connection:
            connection.execute(generation.update().values(number=generation.c.number + 1))
            yield connection


def _directory(connection: sa.Connection) -> Directory:
    return Directory(
        tenants=[_tenant(row) for row in connection.execute(_columns(tenants)).mappings()],
        keys=[_as_key(row) for row in connection.execute(_columns(keys)).mappings()],
        shares=_shares(connection),
    )


def _columns(table: sa.Table) -> sa.Select[Any]:
    """By name, so that columns which a newer program added are not in the way."""
    return sa.select(*table.columns)


def _insert_key(
    connection: sa.Connection,
    tenant: str,
    scopes: frozenset[Scope],
    label: str,
    limits: Limits,
    expires: datetime | None,
) -> tuple[Minted, Key]:
    minted = mint()
    key = Key(
        id=minted.id,
        tenant=tenant,
        hash=minted.hash,
        scopes=scopes,
        label=label[:200],
        limits=limits,
        created=_now(),
        expires=_iso(expires) if expires else None,
    )
    values = {name: getattr(key, name) for name in ("id", "tenant", "hash", "label", "created", "expires", "revoked")}
    connection.execute(keys.insert().values(**values, scopes=",".join(sorted(scopes)), **asdict(limits)))
    return minted, key


def _key(connection: sa.Connection, key_id: str) -> Key:
    row = _row(connection, keys, keys.c.id == key_id)
    if row is None:
        raise NotFound(f"there is no key {key_id!a}", hint="ah key ls")
    return _as_key(row)


def _row(connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool]) -> Any:
    return connection.execute(_columns(table).where(where)).mappings().first()


def _tenant(row: Any) -> Tenant:
    return Tenant(row["name"], base=row["base"], weight=row["weight"], limits=_limits(row), created=row["created"])


def _tenant_values(tenant: Tenant) -> dict[str, Any]:
    values = {name: getattr(tenant, name) for name in ("name", "base", "weight", "created")}
    return values | asdict(tenant.limits)


def _as_key(row: Any) -> Key:
    scopes: Any = frozenset(row["scopes"].split(",")) & SCOPES
    values = {name: row[name] for name in ("id", "tenant", "label", "created", "expires", "revoked")}
    return Key(**values, hash=bytes(row["hash"]), scopes=scopes, limits=_limits(row))


def _limits(row: Any) -> Limits:
    return Limits(**{name: row[name] for name in LIMITS})


def _shares(connection: sa.Connection) -> list[Share]:
    rows = connection.execute(_columns(shares).order_by(shares.c.adapter, shares.c.tenant)).mappings()
    return [Share(AdapterName.parse(row["adapter"]), row["tenant"]) for row in rows]


def _is(adapter: AdapterName, tenant: str) -> sa.ColumnElement[bool]:
    return sa.and_(shares.c.tenant == tenant, shares.c.adapter == str(adapter))


def _expect_one(count: int, name: str) -> None:
    if not count:
        raise _no_tenant(name)


def _no_tenant(name: str) -> NotFound:
    return NotFound(f"there is no tenant {name!a}", hint="ah tenant ls, or ah tenant create NAME")


def _now() -> str:
    return _iso(datetime.now(UTC))


def _iso(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")
