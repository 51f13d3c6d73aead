"""Tenants, keys and shares."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "queue", "context", "output", "adapters")


def upgrade() -> None:
    generation = op.create_table(
        "generation",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(generation, [{"id": 1, "number": 1}])
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("base", sa.Boolean, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        *(sa.Column(name, sa.BigInteger) for name in LIMITS),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name", ondelete="CASCADE"), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("scopes", sa.String(200), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("expires", sa.String(32)),
        sa.Column("revoked", sa.String(32)),
        *(sa.Column(name, sa.BigInteger) for name in LIMITS),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"])
    op.create_table(
        "shares",
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("adapter", sa.String(127), primary_key=True),
    )
