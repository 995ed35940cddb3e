"""Training runs and their checkpoints, for people and for the command line."""

from __future__ import annotations

import re
import time

from litestar import delete, get, put
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import AccessScope, Cursor, Limit, Offset, iso_time
from tinsmith.api.services import Services, ServicesDep
from tinsmith.observe import series
from tinsmith.store.gone import DELETED
from tinsmith.store.rows import CheckpointRow, Principal, RunRow
from tinsmith.types import CheckpointKind, RunId, RunStatus
from tinsmith.validate.requests import check_ttl
from tinsmith.wire.paths import parse_kind
from tinsmith.wire.requests import SetTtl

TYPES = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}
VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})")
KNOWS_EXTERNAL = (0, 28)  # SDK releases before refuse a whole list in which an external checkpoint stands


class Checkpoint(Struct, omit_defaults=True):
    checkpoint_id: str
    checkpoint_type: str
    time: str
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None


class TrainingRun(Struct, omit_defaults=True):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    lora_rank: int | None
    last_request_time: str
    corrupted: bool = False
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class RunList(Struct):
    training_runs: list[TrainingRun]
    cursor: Cursor


class CheckpointList(Struct, omit_defaults=True):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@get("/training_runs")
async def list_runs(
    request: Call,
    services: ServicesDep,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: FromQuery[str | None] = None,
) -> RunList:
    return await services.work(_runs, services, request.user, limit, offset, project_id)


@get("/training_runs/{run_id:str}")
async def get_run(
    request: Call, services: ServicesDep, run_id: FromPath[str], access_scope: AccessScope = "owned"
) -> TrainingRun:
    return await services.work(_run, services, request.user, RunId(run_id))


@delete("/training_runs/{run_id:str}", status_code=204)
async def delete_run(
    request: Call, services: ServicesDep, run_id: FromPath[str], with_checkpoints: FromQuery[bool] = False
) -> None:
    """Delete a run whose requests have ended, with its state and its log. Refused while it has checkpoints, unless they
    are to be deleted with it. What was sampled from it or made of its checkpoints stays, and so does what it cost."""
    user = request.user
    gone = services.store.gone
    await services.write(gone.delete, user.tenant_id, RunId(run_id), with_checkpoints=with_checkpoints, by=user)
    series.LET_GO.add(DELETED)


@get("/training_runs/{run_id:str}/checkpoints")
async def list_run_checkpoints(request: Call, services: ServicesDep, run_id: FromPath[str]) -> CheckpointList:
    return await services.work(_run_checkpoints, services, request, RunId(run_id))


@get("/checkpoints")
async def list_checkpoints(
    request: Call, services: ServicesDep, limit: Limit = 100, offset: Offset = 0
) -> CheckpointList:
    checkpoints = services.store.checkpoints
    rows, total = await services.work(checkpoints.list, request.user.tenant_id, limit, offset, _known_kinds(request))
    cursor = Cursor(offset=offset, limit=limit, total_count=total)
    return CheckpointList(checkpoints=[_checkpoint(row) for row in rows], cursor=cursor)


@delete("/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}", status_code=204)
async def delete_checkpoint(
    request: Call, services: ServicesDep, run_id: FromPath[str], kind: FromPath[str], name: FromPath[str]
) -> None:
    checkpoints = services.store.checkpoints
    user = request.user
    await services.write(checkpoints.delete, user.tenant_id, RunId(run_id), parse_kind(kind), name, by=user)


@put("/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/ttl", status_code=204)
async def set_checkpoint_ttl(
    request: Call,
    services: ServicesDep,
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    data: JSONBody[SetTtl],
) -> None:
    """ttl_seconds null: keep it for good."""
    check_ttl(data.ttl_seconds, services.settings)
    expires_at = None if data.ttl_seconds is None else time.time() + data.ttl_seconds
    checkpoints = services.store.checkpoints
    user = request.user
    place = (user.tenant_id, RunId(run_id), parse_kind(kind), name)
    await services.write(checkpoints.set_expiry, *place, expires_at, by=user)


def _runs(services: Services, principal: Principal, limit: int, offset: int, project_id: str | None) -> RunList:
    rows, total = services.store.runs.list(principal.tenant_id, limit, offset, project_id)
    cursor = Cursor(offset=offset, limit=limit, total_count=total)
    return RunList(training_runs=[_describe(services, principal, row) for row in rows], cursor=cursor)


def _run(services: Services, principal: Principal, run_id: RunId) -> TrainingRun:
    return _describe(services, principal, services.store.runs.get(principal.tenant_id, run_id))


def _run_checkpoints(services: Services, request: Call, run_id: RunId) -> CheckpointList:
    services.store.runs.get(request.user.tenant_id, run_id)
    rows = services.store.checkpoints.list_run(request.user.tenant_id, run_id)
    known = _known_kinds(request)
    return CheckpointList(checkpoints=[_checkpoint(row) for row in rows if row.kind in known])


def _known_kinds(request: Call) -> set[CheckpointKind]:
    """The kinds of checkpoints that the client knows."""
    version = VERSION.match(request.headers.get("x-stainless-package-version", ""))
    is_old = version is not None and (int(version[1]), int(version[2])) < KNOWS_EXTERNAL
    return set(CheckpointKind) - ({CheckpointKind.EXTERNAL} if is_old else set())


def _describe(services: Services, principal: Principal, row: RunRow) -> TrainingRun:
    training, sampler = services.store.checkpoints.last(principal.tenant_id, row.run_id)
    return TrainingRun(
        training_run_id=row.run_id,
        base_model=row.spec.base_model,
        model_owner=principal.tenant_name,
        is_lora=not row.spec.is_full,
        lora_rank=row.spec.rank or None,
        corrupted=row.status is RunStatus.CORRUPTED,
        last_request_time=iso_time(row.last_request_at),
        last_checkpoint=None if training is None else _checkpoint(training),
        last_sampler_checkpoint=None if sampler is None else _checkpoint(sampler),
        user_metadata=row.user_metadata,
    )


def _checkpoint(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=f"{row.kind.value}/{row.name}",
        checkpoint_type=TYPES[row.kind],
        time=iso_time(row.created_at),
        tinker_path=row.path,
        size_bytes=row.size_bytes,
        public=row.is_public,
        user_metadata=row.user_metadata,
        expires_at=None if row.expires_at is None else iso_time(row.expires_at),
    )
