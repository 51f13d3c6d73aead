"""The tables of `database`, as the newest migration leaves them (a test compares the two)."""

from __future__ import annotations

from dataclasses import fields

import sqlalchemy as sa

from adapterhub.serving.tenants.callers import Limits
from adapterhub.serving.usage import COUNTS

metadata = sa.MetaData()
LIMITS = tuple(field.name for field in fields(Limits))

# One row: its number grows with every change of the tables below, so that servers look at one number only.
generation = sa.Table(
    "generation",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
)
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("base", sa.Boolean, nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("created", sa.String(32), nullable=False),  # ISO 8601, UTC: the same text in every database
    *(sa.Column(name, sa.BigInteger) for name in LIMITS),
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("tenant", sa.ForeignKey("tenants.name", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
    sa.Column("scopes", sa.String(200), nullable=False),  # with commas
    sa.Column("label", sa.String(200), nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("expires", sa.String(32)),
    sa.Column("revoked", sa.String(32)),
    *(sa.Column(name, sa.BigInteger) for name in LIMITS),
)
shares = sa.Table(
    "shares",
    metadata,
    sa.Column("tenant", sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("adapter", sa.String(127), primary_key=True),
)
# Of one hour (2026-11-25T14, UTC). Names and not foreign keys: a bill outlives the tenant and the key.
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("hour", sa.String(13), primary_key=True),
    sa.Column("tenant", sa.String(63), primary_key=True),
    sa.Column("key", sa.String(12), primary_key=True),
    sa.Column("adapter", sa.String(127), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in COUNTS),
)
# The last batch of each server that is in `usage`: see `ledger`.
usage_writers = sa.Table(
    "usage_writers",
    metadata,
    sa.Column("writer", sa.String(32), primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
)
