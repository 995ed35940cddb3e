"""Workers tell how long they have computed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_busy_workers"
down_revision = "0006_worker_roles"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("busy_s", sa.Float(), nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("measured_at", sa.Float(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "measured_at")
    op.drop_column("workers", "busy_s")
