"""The rows as the rest of the house sees them: frozen data, no SQL.

`New*` and `Finished` go into the store, `*Row` come out of it. Times are unix seconds. Nothing here opens a connection,
and nothing here knows HTTP or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from tinsmith.scopes import Scope
from tinsmith.store.usage_rows import Usage
from tinsmith.types import (
    BlobKey,
    CheckpointKind,
    Failure,
    OpId,
    OpKind,
    OpState,
    Role,
    RunId,
    RunSpec,
    RunStatus,
    SamplerId,
    SessionId,
    TenantId,
)


@dataclass(frozen=True, slots=True)
class WorkerId:
    """A worker process: its place, and which of the processes that filled it. Every write by a worker carries this."""

    slot: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class WorkerRow:
    slot: str
    incarnation: int
    base_model: str
    registered_at: float
    lease_until: float  # before this moment nobody takes its runs
    is_ready: bool  # its base model is loaded
    role: Role
    busy_s: float  # of computing, from its registration until `measured_at`
    measured_at: float | None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a key speaks for."""

    tenant_id: TenantId
    tenant_name: str
    key_id: str
    scope: Scope
    expires_at: float | None = None

    @property
    def is_admin(self) -> bool:
        return self.scope is Scope.ADMIN


@dataclass(frozen=True, slots=True)
class TenantRow:
    tenant_id: TenantId
    name: str
    created_at: float


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key without its secret, which is kept nowhere."""

    key_id: str
    tenant_id: TenantId
    tenant_name: str
    name: str
    scope: Scope
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    successor_id: str | None = None

    @property
    def is_admin(self) -> bool:
        return self.scope is Scope.ADMIN


@dataclass(frozen=True, slots=True)
class SessionRow:
    """`finished_at` is set once the session has been finished or has expired; `finish_reason` says which."""

    session_id: SessionId
    tenant_id: TenantId
    tags: tuple[str, ...]
    user_metadata: dict[str, Any]
    sdk_version: str | None
    project_id: str | None
    display_name: str | None
    created_at: float
    last_beat_at: float
    finished_at: float | None
    finish_reason: str | None
    finish_detail: str | None


@dataclass(frozen=True, slots=True)
class NewRun:
    """`spec.run_id` is the run's id; `model_seq_id` is its number within the session. adapter_bytes: of its weights."""

    tenant_id: TenantId
    session_id: SessionId
    model_seq_id: int
    spec: RunSpec
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    adapter_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run, its lease and its snapshot.

    head_seq: the highest seq_id up to which every op has arrived; -1 before the first.
    epoch: how often the run was leased. lease_owner: the slot that holds it, None if it is free.
    snapshot_seq: the highest op that the snapshot holds; -1 without one.
    previous_seq, previous_blob: of the snapshot before it; -1 and None if there was none.
    pruned_seq: payloads of ops up to here are forgotten.
    is_changed: its row holds what none can, since bits of it flipped; all but run_id stands for nothing.
    """

    run_id: RunId
    tenant_id: TenantId
    session_id: SessionId
    model_seq_id: int
    spec: RunSpec
    user_metadata: dict[str, str]
    created_at: float
    last_request_at: float
    head_seq: int
    epoch: int
    lease_owner: str | None
    snapshot_seq: int
    snapshot_blob: BlobKey | None
    previous_seq: int
    previous_blob: BlobKey | None
    pruned_seq: int
    status: RunStatus
    is_changed: bool = False

    @property
    def has_previous(self) -> bool:
        """Whether the run can be computed again without its newest snapshot: from the one before, or from CREATE."""
        is_there = self.previous_blob is not None or self.previous_seq < 0
        is_another = self.previous_blob != self.snapshot_blob
        return is_there and is_another and self.pruned_seq <= self.previous_seq <= self.snapshot_seq


@dataclass(frozen=True, slots=True, kw_only=True)
class NewOp:
    """A request as acknowledged. Exactly one of `run_id` and `sampler_id` is set.

    seq_id: 64 bit; an order in a run (0 is CREATE), a mere identity in a sampler.
    payload: the request's body if small, else `payload_blob` names its file; `payload_bytes` is its size either way.
    meta: small JSON; `meta["blob"]` is the blob that a CREATE or LOAD reads, kept until a snapshot covers the op.
    failure: set for a request that was rejected but has to consume its seq_id; the op is born FAILED with it.
    key_id: that it came with, for whose quotas it counts; None: the server's own, or a copy's.
    """

    tenant_id: TenantId
    kind: OpKind
    base_model: str
    id: OpId
    seq_id: int
    run_id: RunId | None = None
    sampler_id: SamplerId | None = None
    cost_tokens: int = 0
    payload: bytes | None = None
    payload_blob: BlobKey | None = None
    payload_bytes: int = 0
    media: str = "application/json"
    meta: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    key_id: str | None = None


class OpRow(Struct, frozen=True, array_like=True):
    """An op and, once it is final, its outcome. Several are made for each request: as a dataclass each would take 5 us.

    payload is None where the call says so (`runnable`), once it was forgotten, and when `payload_blob` has it.
    media and payload_bytes describe the payload; result_media and result_bytes the result.
    attempts: how many workers claimed it without either finishing it or handing it back.
    owner: the slot that claimed it last; None once what a cancelled one had cost is metered.
    payload_crc, result_crc and row_crc: see `checksums`, through which all are read. is_changed: something stood in the
    row that can't, and something else stands here.
    """

    id: OpId
    tenant_id: TenantId
    kind: OpKind
    base_model: str
    run_id: RunId | None
    sampler_id: SamplerId | None
    seq_id: int
    state: OpState
    cost_tokens: int
    attempts: int
    owner: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    media: str
    payload_bytes: int
    payload_blob: BlobKey | None
    meta: dict[str, Any]
    result_media: str | None
    result_bytes: int
    result_blob: BlobKey | None
    failure: Failure | None
    key_id: str | None = None
    payload: bytes | None = None
    result: bytes | None = None
    payload_crc: int | None = None
    result_crc: int | None = None
    row_crc: int | None = None
    is_changed: bool = False


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The op that holds the seq_id: the new one, or the one that was there first."""

    row: OpRow
    is_new: bool


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A file that a name points at.

    expires_at: None: never.
    overwrite: it may take the place of a checkpoint of its name, with all that belongs to that one.
    """

    run_id: RunId
    kind: CheckpointKind
    name: str
    blob: BlobKey
    size_bytes: int
    sha256: str
    expires_at: float | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    has_optimizer: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A named checkpoint and what is needed of its run to make another one from it.

    is_public: other tenants may use its path. A checkpoint that takes the name of a public one is not public.
    """

    tenant_id: TenantId
    run_id: RunId
    kind: CheckpointKind
    name: str
    blob: BlobKey
    size_bytes: int
    sha256: str
    created_at: float
    expires_at: float | None
    user_metadata: dict[str, str]
    has_optimizer: bool
    is_public: bool
    spec: RunSpec

    @property
    def path(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class NewCopy:
    """A copy of `source` in a new run of its own.

    Either `project_id` is set, and the run is the only one of a new session of that project, or `session_id` and
    `model_seq_id` are, and it takes that place.
    request_key: the same key makes the same session, so that a request that is sent again makes no second copy.
    keeps_metadata: what the owner wrote on the source and its run is copied too.
    """

    tenant_id: TenantId
    source: CheckpointRow
    by: Principal | None = None
    project_id: str | None = None
    session_id: SessionId | None = None
    model_seq_id: int = 0
    request_key: str | None = None
    expires_at: float | None = None
    keeps_metadata: bool = True


@dataclass(frozen=True, slots=True)
class NewSampler:
    """`blob` None: the plain base. `run_id` and `spec` are those of the run whose weights it samples.

    is_inflight: it and the run's earlier inflight samplers sample these weights from now on.
    promised_seq: the file isn't written yet; these are the run's weights after that op.
    """

    tenant_id: TenantId
    session_id: SessionId
    sampler_id: SamplerId
    base_model: str
    model_path: str | None = None
    run_id: RunId | None = None
    blob: BlobKey | None = None
    spec: RunSpec | None = None
    is_inflight: bool = False
    promised_seq: int | None = None


@dataclass(frozen=True, slots=True)
class SamplerWeights:
    """What a sampler samples from; blob None: the plain base.

    is_promised: the file isn't written yet. is_lost: nor can it be, as its run's state can't be rebuilt. is_full: they
    are those of a full run.
    """

    blob: BlobKey | None
    is_promised: bool
    is_lost: bool
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class SamplerRow:
    sampler_id: SamplerId
    tenant_id: TenantId
    session_id: SessionId
    base_model: str
    model_path: str | None
    run_id: RunId | None
    blob: BlobKey | None
    spec: RunSpec | None
    created_at: float
    promised_seq: int | None = None


@dataclass(frozen=True, slots=True)
class NewLoss:
    """A custom loss; `blob` holds the request that made it."""

    loss_id: str
    name: str
    blob: BlobKey


@dataclass(frozen=True, slots=True)
class LossRow:
    loss_id: str
    blob: BlobKey


@dataclass(frozen=True, slots=True)
class Finished:
    """The outcome of one op: DONE with a result (inline or a blob), or FAILED with a failure.

    `routes` of a sample request become a file beside its result, `routes_blob`.

    `checkpoint` and `sampler` are rows that come to be in the same transaction, and `usage` is metered in it.
    """

    op_id: OpId
    state: OpState
    result: bytes | None = None
    result_blob: BlobKey | None = None
    result_bytes: int = 0
    routes: bytes | None = None
    routes_blob: BlobKey | None = None
    routes_bytes: int = 0
    media: str = "application/json"
    failure: Failure | None = None
    checkpoint: NewCheckpoint | None = None
    sampler: NewSampler | None = None
    usage: Usage | None = None
