"""Workers that train and workers that sample may be different processes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_worker_roles"
down_revision = "0005_sampler_endings"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("role", sa.Text(), nullable=False, server_default="all"))


def downgrade() -> None:
    op.drop_column("workers", "role")
