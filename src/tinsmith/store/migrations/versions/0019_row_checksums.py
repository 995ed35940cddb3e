"""The columns that a request is born with and that never change have a checksum; rows of before have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019_row_checksums"
down_revision = "0018_checksums"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ops", sa.Column("row_crc", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("ops", "row_crc")
