"""The tables. Migrations bring a database to this shape; a test compares the two.

Owns names, types and indices; knows no statement. Dialect-neutral: times are unix seconds as floats, enums their text,
JSON goes through the engine's serializer. What stays true:

* Rows that change state stay small: payloads and results beyond `inline_bytes` are files, named by a blob key.
* `ops.run_id` and `ops.sampler_id` are no foreign keys: a rejected request occupies its place in a run that never was.
  A CREATE_LOSS has neither: it is final when it is inserted.
* The queue's indices are partial (`state = 'queued'`), so that finished ops cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)


class Meta(TypeDecorator[dict[str, Any]]):
    """JSON of a request or a run. One that can't be read any more is empty, so that no other row is kept from being
    read: what is needed of it is missing then, and its row's checksum says so (see `checksums`)."""

    impl = JSON
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        read = super().result_processor(dialect, coltype)

        def read_or_empty(stored: Any) -> Any:
            try:
                return stored if read is None else read(stored)
            except (ValueError, TypeError):  # no JSON, no UTF-8, or no text
                return {}

        return read_or_empty


NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMING)

RowNum = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows itself only in an INTEGER column
QUEUED = text("state = 'queued'")
PINNED = text("pin_blob IS NOT NULL")
STARTED = text("started_at IS NOT NULL")
HAS_ENDED = text("ended_num IS NOT NULL")
PROMISED = text("promised_seq IS NOT NULL")
RUNNING = text("state = 'running'")
LIVE = text("finished_at IS NULL")
REOPENED = text("reopened_at IS NOT NULL")
INFLIGHT = text("is_inflight = 1")
GOING = text("gone_at IS NOT NULL AND cleared_at IS NULL")
INFLIGHT_PG = text("is_inflight")
FRESH_RESULT = text("finished_at IS NOT NULL AND is_expired = 0")
FRESH_RESULT_PG = text("finished_at IS NOT NULL AND NOT is_expired")

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("weight", Float, nullable=False, server_default="1"),
)

keys = Table(
    "keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),  # sha256 of the secret, hex
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("scope", Text, nullable=False, server_default="full"),
    Column("expires_at", Float),
    Column("successor_id", Text),  # the key that took its place
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("sdk_version", Text),
    Column("project_id", Text),
    Column("display_name", Text),
    Column("created_at", Float, nullable=False),
    Column("last_beat_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("finish_reason", Text),
    Column("finish_detail", Text),
    Column("key_id", Text),  # that opened it: what is used in it counts for that key
    Index(None, "tenant_id", "created_at"),
    Index(None, "finished_at", "last_beat_at"),
    Index("ix_sessions_live", "tenant_id", sqlite_where=LIVE, postgresql_where=LIVE),
)

workers = Table(
    "workers",
    metadata,
    Column("slot", Text, primary_key=True),
    Column("incarnation", Integer, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("registered_at", Float, nullable=False),
    Column("lease_until", Float, nullable=False),
    Column("is_ready", Boolean, nullable=False),  # its base model is loaded
    Column("role", Text, nullable=False),
    Column("busy_s", Float, nullable=False, server_default="0"),  # of computing, since it was registered
    Column("measured_at", Float),  # when `busy_s` was
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("session_id", Text, ForeignKey("sessions.session_id"), nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("spec", Meta, nullable=False),
    Column("user_metadata", Meta, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_request_at", Float, nullable=False),
    Column("head_seq", BigInteger, nullable=False),
    Column("max_seq", BigInteger, nullable=False),  # highest seq_id that arrived, gaps or not
    Column("pruned_seq", BigInteger, nullable=False),  # payloads up to here are forgotten
    Column("epoch", Integer, nullable=False),
    Column("lease_owner", Text, ForeignKey("workers.slot")),
    Column("wants_worker", Boolean, nullable=False),  # free, and an op may have become runnable
    Column("snapshot_seq", BigInteger, nullable=False),
    Column("snapshot_blob", Text),
    Column("snapshot_bytes", BigInteger, nullable=False),
    Column("previous_seq", BigInteger, nullable=False, server_default="-1"),  # of the snapshot before that one
    Column("previous_blob", Text),
    Column("previous_bytes", BigInteger, nullable=False, server_default="0"),
    Column("damaged_at", Float),  # when a snapshot that was found damaged was last replaced
    Column("status", Text, nullable=False),
    Column("adapter_bytes", BigInteger, nullable=False, server_default="0"),
    Column("key_id", Text),  # for whose quotas it counts while it is open
    Column("reopened_at", Float),  # when a request of it was last begun after its session had ended
    Column("gone_at", Float),  # when it was let go
    Column("gone_why", Text),
    Column("cleared_at", Float),  # when the last of it had been let go but for this row
    Column("row_crc", BigInteger),  # CRC-32 of what never changes (see checksums.RUN_BORN_WITH); null: of before
    UniqueConstraint("session_id", "model_seq_id"),
    Index(None, "tenant_id", "created_at"),
    Index(None, "lease_owner"),
    Index(None, "wants_worker", "base_model"),
    Index("ix_runs_reopened", "tenant_id", "reopened_at", sqlite_where=REOPENED, postgresql_where=REOPENED),
    Index("ix_runs_going", "gone_at", sqlite_where=GOING, postgresql_where=GOING),
)

ops = Table(
    "ops",
    metadata,
    Column("num", RowNum, primary_key=True, autoincrement=True),  # order of arrival
    Column("op_id", Text, nullable=False, unique=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("run_id", Text),
    Column("sampler_id", Text),
    Column("seq_id", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("cost_tokens", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("excused", Integer, nullable=False, server_default="0"),  # attempts that somebody outside put an end to
    Column("owner", Text),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("is_expired", Boolean, nullable=False),  # its result is gone for good
    Column("media", Text, nullable=False),
    Column("payload_bytes", BigInteger, nullable=False),
    Column("payload_blob", Text),
    Column("meta", Meta, nullable=False),
    Column("pin_blob", Text),  # meta["blob"] of an op (see op_rows.PINNING) that no snapshot covers yet
    Column("result_media", Text),
    Column("result_bytes", BigInteger, nullable=False),
    Column("result_blob", Text),
    Column("routes_blob", Text),  # of a sample request that recorded its routes, as long as its result is there
    Column("routes_bytes", BigInteger),
    Column("failure_code", Text),
    Column("failure_category", Text),
    Column("failure_message", Text),
    Column("ended_num", BigInteger),  # of a sample: which of its sampler's requests ended, in the order of commits
    Column("payload", LargeBinary),
    Column("result", LargeBinary),
    Column("key_id", Text),  # that it came with; null: of before these were kept
    Column("payload_crc", BigInteger),  # CRC-32 of `payload` and of `result` as long as they are there; null: of before
    Column("result_crc", BigInteger),
    Column("row_crc", BigInteger),  # CRC-32 of what never changes (see checksums.BORN_WITH); null: of before
    UniqueConstraint("run_id", "seq_id"),
    UniqueConstraint("sampler_id", "seq_id"),
    Index("ix_ops_queue", "base_model", "kind", "num", sqlite_where=QUEUED, postgresql_where=QUEUED),
    Index("ix_ops_run_queue", "run_id", "seq_id", sqlite_where=QUEUED, postgresql_where=QUEUED),
    Index("ix_ops_running", "owner", sqlite_where=RUNNING, postgresql_where=RUNNING),
    Index("ix_ops_under_way", "tenant_id", sqlite_where=RUNNING, postgresql_where=RUNNING),
    Index("ix_ops_started", "started_at", sqlite_where=STARTED, postgresql_where=STARTED),
    Index("ix_ops_pins", "pin_blob", sqlite_where=PINNED, postgresql_where=PINNED),
    Index("ix_ops_endings", "sampler_id", "ended_num", sqlite_where=HAS_ENDED, postgresql_where=HAS_ENDED),
    Index("ix_ops_results", "finished_at", sqlite_where=FRESH_RESULT, postgresql_where=FRESH_RESULT_PG),
)

replays = Table(  # finished ops that a worker has begun to compute again, and not ended
    "replays",
    metadata,
    Column("op_id", Text, primary_key=True),
    Column("num_begun", Integer, nullable=False),
    Column("excused", Integer, nullable=False, server_default="0"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("session_id", Text, ForeignKey("sessions.session_id"), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("model_path", Text),
    Column("run_id", Text),
    Column("blob", Text),
    Column("spec", JSON(none_as_null=True)),
    Column("created_at", Float, nullable=False),
    Column("num_ended", BigInteger, nullable=False, server_default="0"),  # of its requests
    Column("num_joined", BigInteger, nullable=False, server_default="0"),  # clones that got a number of their own
    Column("is_inflight", Boolean, nullable=False, server_default=false()),  # follows the run's inflight saves
    Column("promised_seq", BigInteger),  # `blob` isn't written yet: the run's weights after this op
    Index(None, "session_id"),
    Index(None, "blob"),
    Index("ix_samplers_promised", "run_id", sqlite_where=PROMISED, postgresql_where=PROMISED),
    Index("ix_samplers_inflight", "run_id", sqlite_where=INFLIGHT, postgresql_where=INFLIGHT_PG),
)

custom_losses = Table(
    "custom_losses",
    metadata,
    Column("loss_id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("session_id", Text, ForeignKey("sessions.session_id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("blob", Text, nullable=False),  # the request that made it
    Column("created_at", Float, nullable=False),
    Index(None, "session_id"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id"), primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("blob", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("user_metadata", JSON, nullable=False),
    Column("has_optimizer", Boolean, nullable=False),
    Column("is_public", Boolean, nullable=False, server_default=false()),  # other tenants may use its path
    Column("key_id", Text),  # for whose quotas it counts
    Index(None, "tenant_id", "created_at"),
    Index(None, "expires_at"),
    Index(None, "blob"),
)

dead_blobs = Table(  # files whose row is gone; `checkpoints.collect` hands them out for deletion
    "dead_blobs",
    metadata,
    Column("blob", Text, primary_key=True),
    Column("died_at", Float, nullable=False),
    Index(None, "died_at"),
)

usage = Table(  # the ledger: summed by hour, run and kind
    "usage",
    metadata,
    Column("hour", BigInteger, primary_key=True),  # unix seconds at which it began
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), primary_key=True),
    Column("session_id", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),  # empty: no run's weights were used
    Column("base_model", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("quantity", BigInteger, nullable=False),
)

usage_days = Table(  # what was moved here from `usage` when it was old, summed by day
    "usage_days",
    metadata,
    Column("day", BigInteger, primary_key=True),  # unix seconds at which it began, in UTC
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), primary_key=True),
    Column("session_id", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("base_model", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("quantity", BigInteger, nullable=False),
    Index(None, "session_id"),
)

quotas = Table(
    "quotas",
    metadata,
    Column("scope", Text, primary_key=True),  # a tenant or a key
    Column("quota", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("amount", Float, nullable=False),
)

tallies = Table(  # the ledger once more, summed by day and by month of each tenant and key
    "tallies",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("period", Text, primary_key=True),  # in UTC: 2026-01-31, 2026-01
    Column("kind", Text, primary_key=True),
    Column("quantity", BigInteger, nullable=False),
)

spans = Table(  # when checkpoints were stored; rows stay when they are gone
    "spans",
    metadata,
    Column("num", RowNum, primary_key=True, autoincrement=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),
    Column("run_id", Text, ForeignKey("runs.run_id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("since", Float, nullable=False),
    Column("until", Float),  # deleted, replaced or to expire; null: stored for good
    Index(None, "run_id", "kind", "name"),
    Index(None, "until"),
)

audit = Table(
    "audit",
    metadata,
    Column("num", RowNum, primary_key=True, autoincrement=True),
    Column("tenant_id", Text, ForeignKey("tenants.tenant_id"), nullable=False),  # whose object it was about
    Column("at", Float, nullable=False),
    Column("resource", Text, nullable=False),
    Column("event", Text, nullable=False),
    Column("details", JSON, nullable=False),
    Index(None, "at"),
)
