"""A replay that ends its worker is found: which finished requests are being computed again, and who died of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010_replays_under_way"
down_revision = "0009_quotas"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "replays",
        sa.Column("op_id", sa.Text(), nullable=False),
        sa.Column("num_begun", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("op_id", name=op.f("pk_replays")),
    )


def downgrade() -> None:
    op.drop_table("replays")
