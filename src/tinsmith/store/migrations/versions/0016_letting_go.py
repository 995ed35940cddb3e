"""Runs can be let go, and old usage is kept by the day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016_letting_go"
down_revision = "0015_routes"
branch_labels = None
depends_on = None

GOING = sa.text("gone_at IS NOT NULL AND cleared_at IS NULL")


def upgrade() -> None:
    op.add_column("runs", sa.Column("gone_at", sa.Float(), nullable=True))
    op.add_column("runs", sa.Column("gone_why", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("cleared_at", sa.Float(), nullable=True))
    op.create_index("ix_runs_going", "runs", ["gone_at"], sqlite_where=GOING, postgresql_where=GOING)
    op.create_table(
        "usage_days",
        sa.Column("day", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name="fk_usage_days_tenant_id"),
        sa.PrimaryKeyConstraint("day", "tenant_id", "session_id", "run_id", "base_model", "kind", name="pk_usage_days"),
    )
    op.create_index("ix_usage_days_session_id", "usage_days", ["session_id"])


def downgrade() -> None:
    op.drop_table("usage_days")
    op.drop_index("ix_runs_going", "runs")
    op.drop_column("runs", "cleared_at")
    op.drop_column("runs", "gone_why")
    op.drop_column("runs", "gone_at")
