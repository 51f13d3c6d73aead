"""Usage by hour, and which batches of it were booked."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COUNTS = (
    "requests",
    "cancelled",
    "failed",
    "tokens_in",
    "tokens_out",
    "tokens_cached",
    "cold_loads",
    "resident_ms",
)


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("hour", sa.String(13), primary_key=True),
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("key", sa.String(12), primary_key=True),
        sa.Column("adapter", sa.String(127), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in COUNTS),
    )
    op.create_table(
        "usage_writers",
        sa.Column("writer", sa.String(32), primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
