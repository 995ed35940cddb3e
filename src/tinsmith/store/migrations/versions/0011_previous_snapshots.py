"""A run keeps the snapshot before its newest one, and says when one was found damaged last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011_previous_snapshots"
down_revision = "0010_replays_under_way"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("previous_seq", sa.BigInteger(), nullable=False, server_default="-1"))
    op.add_column("runs", sa.Column("previous_blob", sa.Text(), nullable=True))
    op.add_column("runs", sa.Column("previous_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("damaged_at", sa.Float(), nullable=True))


def downgrade() -> None:
    for column in ("damaged_at", "previous_bytes", "previous_blob", "previous_seq"):
        op.drop_column("runs", column)
