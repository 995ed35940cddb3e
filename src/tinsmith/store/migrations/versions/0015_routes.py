"""Sample requests may have recorded the routes of their tokens, in a file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015_routes"
down_revision = "0014_keys_of_requests"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ops", sa.Column("routes_blob", sa.Text(), nullable=True))
    op.add_column("ops", sa.Column("routes_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("ops", "routes_bytes")
    op.drop_column("ops", "routes_blob")
