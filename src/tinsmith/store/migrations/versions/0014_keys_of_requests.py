"""Who asked for what: the key of each request, run and checkpoint, so that a key's quotas count what it asked for;
when a run whose session has ended was trained again; an index of the sessions that live.

Requests of before count for the key that opened their session. Rows of requests whose results have expired, and that
no recovery needs, are dropped as they are from now on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014_keys_of_requests"
down_revision = "0013_key_scopes"
branch_labels = None
depends_on = None

LIVE = sa.text("finished_at IS NULL")
REOPENED = sa.text("reopened_at IS NOT NULL")
OPENER = "(SELECT key_id FROM sessions WHERE sessions.session_id = runs.session_id)"
DROP = """
DELETE FROM ops WHERE is_expired AND finished_at IS NOT NULL AND pin_blob IS NULL AND payload_blob IS NULL
AND result_blob IS NULL AND num < (SELECT max(num) FROM ops)
AND (run_id IS NULL OR EXISTS (SELECT 1 FROM runs WHERE runs.run_id = ops.run_id AND runs.status <> 'copy'
AND ops.seq_id <= runs.pruned_seq))
"""


def upgrade() -> None:
    op.add_column("ops", sa.Column("key_id", sa.Text()))
    op.add_column("runs", sa.Column("key_id", sa.Text()))
    op.add_column("runs", sa.Column("reopened_at", sa.Float()))
    op.add_column("checkpoints", sa.Column("key_id", sa.Text()))
    op.create_index("ix_sessions_live", "sessions", ["tenant_id"], sqlite_where=LIVE, postgresql_where=LIVE)
    op.create_index(
        "ix_runs_reopened", "runs", ["tenant_id", "reopened_at"], sqlite_where=REOPENED, postgresql_where=REOPENED
    )
    op.execute(f"UPDATE runs SET key_id = {OPENER}")
    op.execute("UPDATE checkpoints SET key_id = (SELECT key_id FROM runs WHERE runs.run_id = checkpoints.run_id)")
    op.execute(DROP)


def downgrade() -> None:
    op.drop_index("ix_runs_reopened", "runs")
    op.drop_index("ix_sessions_live", "sessions")
    op.drop_column("checkpoints", "key_id")
    for name in ("reopened_at", "key_id"):
        op.drop_column("runs", name)
    op.drop_column("ops", "key_id")
