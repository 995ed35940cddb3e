"""Checkpoints can be published."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_published_checkpoints"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("is_public", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("checkpoints", "is_public")
