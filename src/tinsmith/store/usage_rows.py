"""Rows of what was used, stored, done and seen: the ledger's, the audit log's and a timeline's. Frozen data, no SQL.

Times are unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tinsmith.types import OpId, OpKind, OpState, TenantId


class UsageKind(StrEnum):
    """What the ledger counts: tokens, and checkpoints made."""

    TRAINING = "training"
    PREFILL = "prefill"
    PREFILL_CACHED = "prefill_cached"
    SAMPLE = "sample"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Usage:
    """What computing one op took, in tokens. cached_tokens: prompt tokens that were there already; the others are
    prefill_tokens."""

    trained_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    checkpoints: int = 0

    def amounts(self) -> dict[UsageKind, int]:
        """Those that aren't zero."""
        counts = {
            UsageKind.TRAINING: self.trained_tokens,
            UsageKind.PREFILL: self.prefill_tokens,
            UsageKind.PREFILL_CACHED: self.cached_tokens,
            UsageKind.SAMPLE: self.sampled_tokens,
            UsageKind.CHECKPOINT: self.checkpoints,
        }
        return {kind: count for kind, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One line of the ledger. hour: unix seconds at which it began; of seconds: an hour, or a day once it is old.
    run_id None: a plain base was sampled."""

    hour: int
    seconds: int
    tenant_id: TenantId
    tenant_name: str
    session_id: str | None
    project_id: str | None
    user_metadata: dict[str, Any]
    run_id: str | None
    base_model: str
    kind: UsageKind
    quantity: int


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A checkpoint's stay on disk. until None: it is there, for good."""

    tenant_id: TenantId
    tenant_name: str
    session_id: str
    project_id: str | None
    user_metadata: dict[str, Any]
    run_id: str
    base_model: str
    size_bytes: int
    since: float
    until: float | None


@dataclass(frozen=True, slots=True)
class StorageRow:
    """What the live checkpoints of a tenant in one project take."""

    tenant_id: TenantId
    tenant_name: str
    project_id: str | None
    num_checkpoints: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One act. tenant_id: whose object it was about."""

    at: float
    event: str
    tenant_id: TenantId
    details: dict[str, str]


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Acts, oldest first. before: where the next page ends; None: there are no older ones."""

    rows: list[AuditRow]
    before: tuple[float, int] | None


@dataclass(frozen=True, slots=True)
class TracedOp:
    """A request as a timeline shows it. place: the run or sampler that it is of. owner: the worker."""

    id: OpId
    kind: OpKind
    base_model: str
    place: str
    seq_id: int
    state: OpState
    cost_tokens: int
    attempts: int
    owner: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    failure_code: str | None

    @property
    def step(self) -> tuple[str, float, str] | None:
        """What it was computed in: (worker, moment, kind of step); None before, and for samples."""
        if self.owner is None or self.started_at is None or self.kind is OpKind.SAMPLE:
            return None
        return self.owner, self.started_at, "pass" if self.kind.is_pass else self.kind.value


@dataclass(frozen=True, slots=True)
class SharedStep:
    """One pass, or one batched step, of all tenants together."""

    num_requests: int
    num_runs: int
    num_tokens: int
