"""Custom losses: one row for each graph that a session uploaded.

Frozen: the table as it was when this revision was made, whatever schema.py says by now.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_custom_losses"
down_revision = "0003_usage_and_audit"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "custom_losses",
        sa.Column("loss_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("loss_id", name=op.f("pk_custom_losses")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_custom_losses_tenant_id")),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name=op.f("fk_custom_losses_session_id")),
    )
    op.create_index("ix_custom_losses_session_id", "custom_losses", ["session_id"])


def downgrade() -> None:
    op.drop_table("custom_losses")
