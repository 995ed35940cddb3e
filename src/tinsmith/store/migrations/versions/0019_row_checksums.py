"""What requests and runs are born with and never changes has a checksum; rows of before have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019_row_checksums"
down_revision = "0018_checksums"
branch_labels = None
depends_on = None


TABLES = ("ops", "runs")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("row_crc", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "row_crc")
