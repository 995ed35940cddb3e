"""Between the columns of `runs` and RunRow: the select list and the conversion. Knows no statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tinsmith.store.checksums import crc_of, encode
from tinsmith.store.rows import NewRun, RunRow
from tinsmith.store.schema import runs
from tinsmith.types import RunId, RunSpec, RunStatus, SessionId, TenantId

COLUMNS = (
    runs.c.run_id, runs.c.tenant_id, runs.c.session_id, runs.c.model_seq_id, runs.c.spec, runs.c.user_metadata,
    runs.c.created_at, runs.c.last_request_at, runs.c.head_seq, runs.c.epoch, runs.c.lease_owner, runs.c.snapshot_seq,
    runs.c.snapshot_blob, runs.c.previous_seq, runs.c.previous_blob, runs.c.pruned_seq, runs.c.status,
)  # fmt: skip

_TIME, _TEXT_OR_NONE = float | int, str | None
_MAY_BE = (  # of each column
    str, str, str, int, dict, dict, _TIME, _TIME, int, int, _TEXT_OR_NONE, int, _TEXT_OR_NONE, int, _TEXT_OR_NONE, int,
    str,
)  # fmt: skip


def to_run(row: Sequence[Any]) -> RunRow:
    """A RunRow from a row of COLUMNS."""
    (run_id, tenant_id, session_id, model_seq_id, spec, user_metadata, created_at, last_request_at, head_seq, epoch,
     lease_owner, snapshot_seq, snapshot_blob, previous_seq, previous_blob, pruned_seq, status) = row  # fmt: skip
    try:
        known_spec, known_status = to_spec(spec), RunStatus(status)
    except ValueError:
        return _changed(RunId(str(run_id)), TenantId(str(tenant_id)))
    if not all(map(isinstance, row, _MAY_BE)):
        return _changed(RunId(str(run_id)), TenantId(str(tenant_id)))
    return RunRow(
        run_id=run_id,
        tenant_id=tenant_id,
        session_id=session_id,
        model_seq_id=model_seq_id,
        spec=known_spec,
        user_metadata=user_metadata,
        created_at=created_at,
        last_request_at=last_request_at,
        head_seq=head_seq,
        epoch=epoch,
        lease_owner=lease_owner,
        snapshot_seq=snapshot_seq,
        snapshot_blob=snapshot_blob,
        previous_seq=previous_seq,
        previous_blob=previous_blob,
        pruned_seq=pruned_seq,
        status=known_status,
    )


def _changed(run_id: RunId, tenant_id: TenantId) -> RunRow:
    return RunRow(
        run_id=run_id,
        tenant_id=tenant_id,
        session_id=SessionId(""),
        model_seq_id=-1,
        spec=RunSpec(run_id, ""),
        user_metadata={},
        created_at=0.0,
        last_request_at=0.0,
        head_seq=-1,
        epoch=0,
        lease_owner=None,
        snapshot_seq=-1,
        snapshot_blob=None,
        previous_seq=-1,
        previous_blob=None,
        pruned_seq=-1,
        status=RunStatus.CORRUPTED,
        is_changed=True,
    )


def to_spec(stored: Any) -> RunSpec:
    return msgspec.convert(stored, RunSpec)


def new_run_columns(run: NewRun, now: float) -> dict[str, Any]:
    """The parameters that insert a run whose CREATE op is inserted beside it: free, and in want of a worker."""
    spec = run.spec
    born_with = (
        spec.run_id, run.tenant_id, run.session_id, run.model_seq_id, spec.base_model, float(now), spec,
    )  # fmt: skip
    return {
        "run_id": run.spec.run_id,
        "tenant_id": run.tenant_id,
        "session_id": run.session_id,
        "model_seq_id": run.model_seq_id,
        "base_model": run.spec.base_model,
        "spec": run.spec,
        "user_metadata": dict(run.user_metadata),
        "created_at": now,
        "last_request_at": now,
        "head_seq": 0,
        "max_seq": 0,
        "pruned_seq": -1,
        "epoch": 0,
        "wants_worker": True,
        "snapshot_seq": -1,
        "snapshot_bytes": 0,
        "status": RunStatus.CREATING.value,
        "adapter_bytes": run.adapter_bytes,
        "row_crc": crc_of(encode(born_with)),
    }
