"""Deaths of workers that were killed from outside are told apart from those that a request may have caused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017_excused"
down_revision = "0016_letting_go"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("ops", "replays"):
        op.add_column(table, sa.Column("excused", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    for table in ("ops", "replays"):
        op.drop_column(table, "excused")
