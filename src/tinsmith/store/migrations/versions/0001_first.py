"""The first schema: tenants and keys, sessions, workers, runs, ops, samplers, checkpoints, dead blobs.

Frozen: the tables as they were when this revision was made, whatever schema.py says by now.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_tenants()
    _create_keys()
    _create_sessions()
    _create_workers()
    _create_runs()
    _create_ops()
    _create_samplers()
    _create_checkpoints()
    _create_dead_blobs()


def downgrade() -> None:
    for table in ("dead_blobs", "checkpoints", "samplers", "ops", "runs", "workers", "sessions", "keys", "tenants"):
        op.drop_table(table)


def _create_tenants() -> None:
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )


def _create_keys() -> None:
    op.create_table(
        "keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_keys_tenant_id")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_keys_digest")),
    )


def _create_sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("sdk_version", sa.Text(), nullable=True),
        sa.Column("project_id", sa.Text(), nullable=True),
        sa.Column("display_name", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_beat_at", sa.Float(), nullable=False),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.Column("finish_detail", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_sessions_tenant_id")),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    op.create_index(
        op.f("ix_sessions_finished_at_last_beat_at"), "sessions", ["finished_at", "last_beat_at"], unique=False
    )
    op.create_index(op.f("ix_sessions_tenant_id_created_at"), "sessions", ["tenant_id", "created_at"], unique=False)


def _create_workers() -> None:
    op.create_table(
        "workers",
        sa.Column("slot", sa.Text(), nullable=False),
        sa.Column("incarnation", sa.Integer(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("registered_at", sa.Float(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("is_ready", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("slot", name=op.f("pk_workers")),
    )


def _create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("model_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_request_at", sa.Float(), nullable=False),
        sa.Column("head_seq", sa.BigInteger(), nullable=False),
        sa.Column("max_seq", sa.BigInteger(), nullable=False),
        sa.Column("pruned_seq", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("wants_worker", sa.Boolean(), nullable=False),
        sa.Column("snapshot_seq", sa.BigInteger(), nullable=False),
        sa.Column("snapshot_blob", sa.Text(), nullable=True),
        sa.Column("snapshot_bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["lease_owner"], ["workers.slot"], name=op.f("fk_runs_lease_owner")),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name=op.f("fk_runs_session_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_runs_tenant_id")),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_runs")),
        sa.UniqueConstraint("session_id", "model_seq_id", name=op.f("uq_runs_session_id_model_seq_id")),
    )
    op.create_index(op.f("ix_runs_lease_owner"), "runs", ["lease_owner"], unique=False)
    op.create_index(op.f("ix_runs_tenant_id_created_at"), "runs", ["tenant_id", "created_at"], unique=False)
    op.create_index(op.f("ix_runs_wants_worker_base_model"), "runs", ["wants_worker", "base_model"], unique=False)


def _create_ops() -> None:
    op.create_table(
        "ops",
        sa.Column("num", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("op_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("sampler_id", sa.Text(), nullable=True),
        sa.Column("seq_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("cost_tokens", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("is_expired", sa.Boolean(), nullable=False),
        sa.Column("media", sa.Text(), nullable=False),
        sa.Column("payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("payload_blob", sa.Text(), nullable=True),
        sa.Column("meta", sa.JSON(), nullable=False),
        sa.Column("pin_blob", sa.Text(), nullable=True),
        sa.Column("result_media", sa.Text(), nullable=True),
        sa.Column("result_bytes", sa.BigInteger(), nullable=False),
        sa.Column("result_blob", sa.Text(), nullable=True),
        sa.Column("failure_code", sa.Text(), nullable=True),
        sa.Column("failure_category", sa.Text(), nullable=True),
        sa.Column("failure_message", sa.Text(), nullable=True),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_ops_tenant_id")),
        sa.PrimaryKeyConstraint("num", name=op.f("pk_ops")),
        sa.UniqueConstraint("op_id", name=op.f("uq_ops_op_id")),
        sa.UniqueConstraint("run_id", "seq_id", name=op.f("uq_ops_run_id_seq_id")),
        sa.UniqueConstraint("sampler_id", "seq_id", name=op.f("uq_ops_sampler_id_seq_id")),
    )
    op.create_index(
        "ix_ops_pins",
        "ops",
        ["pin_blob"],
        unique=False,
        sqlite_where=sa.text("pin_blob IS NOT NULL"),
        postgresql_where=sa.text("pin_blob IS NOT NULL"),
    )
    op.create_index(
        "ix_ops_queue",
        "ops",
        ["base_model", "kind", "num"],
        unique=False,
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_ops_results",
        "ops",
        ["finished_at"],
        unique=False,
        sqlite_where=sa.text("finished_at IS NOT NULL AND is_expired = 0"),
        postgresql_where=sa.text("finished_at IS NOT NULL AND NOT is_expired"),
    )
    op.create_index(
        "ix_ops_run_queue",
        "ops",
        ["run_id", "seq_id"],
        unique=False,
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_ops_running",
        "ops",
        ["owner"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )


def _create_samplers() -> None:
    op.create_table(
        "samplers",
        sa.Column("sampler_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("model_path", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("blob", sa.Text(), nullable=True),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name=op.f("fk_samplers_session_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_samplers_tenant_id")),
        sa.PrimaryKeyConstraint("sampler_id", name=op.f("pk_samplers")),
    )
    op.create_index(op.f("ix_samplers_blob"), "samplers", ["blob"], unique=False)
    op.create_index(op.f("ix_samplers_session_id"), "samplers", ["session_id"], unique=False)


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("has_optimizer", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_checkpoints_run_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_checkpoints_tenant_id")),
        sa.PrimaryKeyConstraint("run_id", "kind", "name", name=op.f("pk_checkpoints")),
    )
    op.create_index(op.f("ix_checkpoints_blob"), "checkpoints", ["blob"], unique=False)
    op.create_index(op.f("ix_checkpoints_expires_at"), "checkpoints", ["expires_at"], unique=False)
    op.create_index(
        op.f("ix_checkpoints_tenant_id_created_at"), "checkpoints", ["tenant_id", "created_at"], unique=False
    )


def _create_dead_blobs() -> None:
    op.create_table(
        "dead_blobs",
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("died_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("blob", name=op.f("pk_dead_blobs")),
    )
    op.create_index(op.f("ix_dead_blobs_died_at"), "dead_blobs", ["died_at"], unique=False)
