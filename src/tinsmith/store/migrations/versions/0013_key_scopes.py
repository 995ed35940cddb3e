"""Keys have a scope in place of a mark for administrators, may expire, and know their successor."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013_key_scopes"
down_revision = "0012_tenant_weights"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("scope", sa.Text(), nullable=False, server_default="full"))
    op.add_column("keys", sa.Column("expires_at", sa.Float(), nullable=True))
    op.add_column("keys", sa.Column("successor_id", sa.Text(), nullable=True))
    op.execute("UPDATE keys SET scope = 'admin' WHERE is_admin")
    op.drop_column("keys", "is_admin")


def downgrade() -> None:
    op.add_column("keys", sa.Column("is_admin", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE keys SET is_admin = (scope = 'admin')")
    for name in ("successor_id", "expires_at", "scope"):
        op.drop_column("keys", name)
