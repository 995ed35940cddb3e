"""Payloads and results that stand in rows have checksums; those of before have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018_checksums"
down_revision = "0017_excused"
branch_labels = None
depends_on = None

COLUMNS = ("payload_crc", "result_crc")


def upgrade() -> None:
    for name in COLUMNS:
        op.add_column("ops", sa.Column(name, sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for name in COLUMNS:
        op.drop_column("ops", name)
