"""Samplers count the ends of their requests and those who join them, and may be inflight; ops number their ends."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_sampler_endings"
down_revision = "0004_custom_losses"
branch_labels = None
depends_on = None

HAS_ENDED = sa.text("ended_num IS NOT NULL")
INFLIGHT = sa.text("is_inflight = 1")
INFLIGHT_PG = sa.text("is_inflight")


def upgrade() -> None:
    op.add_column("ops", sa.Column("ended_num", sa.BigInteger()))
    op.create_index(
        "ix_ops_endings", "ops", ["sampler_id", "ended_num"], sqlite_where=HAS_ENDED, postgresql_where=HAS_ENDED
    )
    op.add_column("samplers", sa.Column("num_ended", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("samplers", sa.Column("num_joined", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("samplers", sa.Column("is_inflight", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_samplers_inflight", "samplers", ["run_id"], sqlite_where=INFLIGHT, postgresql_where=INFLIGHT_PG)


def downgrade() -> None:
    op.drop_index("ix_samplers_inflight", "samplers")
    for column in ("num_ended", "num_joined", "is_inflight"):
        op.drop_column("samplers", column)
    op.drop_index("ix_ops_endings", "ops")
    op.drop_column("ops", "ended_num")
