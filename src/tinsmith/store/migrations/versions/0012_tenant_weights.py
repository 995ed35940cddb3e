"""A tenant's weight: how much of the engine it gets beside others; 1 unless an administrator says otherwise."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012_tenant_weights"
down_revision = "0011_previous_snapshots"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("weight", sa.Float(), nullable=False, server_default="1"))


def downgrade() -> None:
    op.drop_column("tenants", "weight")
