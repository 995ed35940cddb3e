"""A sampler may be usable before its file is written: its row then says after which op its run had these weights."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_promised_samplers"
down_revision = "0007_busy_workers"
branch_labels = None
depends_on = None

PROMISED = sa.text("promised_seq IS NOT NULL")


def upgrade() -> None:
    op.add_column("samplers", sa.Column("promised_seq", sa.BigInteger(), nullable=True))
    op.create_index("ix_samplers_promised", "samplers", ["run_id"], sqlite_where=PROMISED, postgresql_where=PROMISED)


def downgrade() -> None:
    op.drop_index("ix_samplers_promised", "samplers")
    op.drop_column("samplers", "promised_seq")
