"""Quotas, and what counts against them: tallies of the ledger, who opened a session, the size of a run's adapter.

The tallies of tenants begin with what the ledger has; a session of before counts for its tenant alone.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009_quotas"
down_revision = "0008_promised_samplers"
branch_labels = None
depends_on = None

RUNNING = sa.text("state = 'running'")
TALLY = """
INSERT INTO tallies (scope, period, kind, quantity)
SELECT tenant_id, strftime('{period}', hour, 'unixepoch'), kind, sum(quantity) FROM usage GROUP BY 1, 2, 3
"""
TALLY_PG = """
INSERT INTO tallies (scope, period, kind, quantity)
SELECT tenant_id, to_char(to_timestamp(hour) AT TIME ZONE 'UTC', '{period}'), kind, sum(quantity)
FROM usage GROUP BY 1, 2, 3
"""


def upgrade() -> None:
    op.add_column("sessions", sa.Column("key_id", sa.Text()))
    op.add_column("runs", sa.Column("adapter_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_ops_under_way", "ops", ["tenant_id"], sqlite_where=RUNNING, postgresql_where=RUNNING)
    op.create_table(
        "quotas",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("quota", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("amount", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "quota", name="pk_quotas"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name="fk_quotas_tenant_id"),
    )
    op.create_table(
        "tallies",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "period", "kind", name="pk_tallies"),
    )
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for on_sqlite, on_postgresql in (("%Y-%m-%d", "YYYY-MM-DD"), ("%Y-%m", "YYYY-MM")):
        op.execute(TALLY.format(period=on_sqlite) if is_sqlite else TALLY_PG.format(period=on_postgresql))


def downgrade() -> None:
    op.drop_table("tallies")
    op.drop_table("quotas")
    op.drop_index("ix_ops_under_way", "ops")
    op.drop_column("runs", "adapter_bytes")
    op.drop_column("sessions", "key_id")
