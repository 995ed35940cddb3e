"""The ledger of usage and storage, the audit log, and the index by which a pass's requests are found again.

Checkpoints that are there already count as stored since they were made.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_usage_and_audit"
down_revision = "0002_published_checkpoints"
branch_labels = None
depends_on = None

RowNum = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STARTED = sa.text("started_at IS NOT NULL")


def upgrade() -> None:
    _create_usage()
    _create_spans()
    _create_audit()
    op.create_index("ix_ops_started", "ops", ["started_at"], sqlite_where=STARTED, postgresql_where=STARTED)
    op.execute(
        "INSERT INTO spans (tenant_id, run_id, kind, name, size_bytes, since, until) "
        "SELECT tenant_id, run_id, kind, name, size_bytes, created_at, expires_at FROM checkpoints"
    )


def downgrade() -> None:
    op.drop_index("ix_ops_started", "ops")
    for table in ("audit", "spans", "usage"):
        op.drop_table(table)


def _create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_usage_tenant_id")),
        sa.PrimaryKeyConstraint(
            "hour", "tenant_id", "session_id", "run_id", "base_model", "kind", name=op.f("pk_usage")
        ),
    )


def _create_spans() -> None:
    op.create_table(
        "spans",
        sa.Column("num", RowNum, autoincrement=True, nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("until", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_spans_tenant_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_spans_run_id")),
        sa.PrimaryKeyConstraint("num", name=op.f("pk_spans")),
    )
    op.create_index(op.f("ix_spans_run_id_kind_name"), "spans", ["run_id", "kind", "name"], unique=False)
    op.create_index(op.f("ix_spans_until"), "spans", ["until"], unique=False)


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("num", RowNum, autoincrement=True, nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_audit_tenant_id")),
        sa.PrimaryKeyConstraint("num", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_at"), "audit", ["at"], unique=False)
