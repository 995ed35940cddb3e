"""The audit log of a day."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta
from typing import Literal

from litestar import get
from litestar.params import FromQuery
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import iso_time
from tinsmith.api.services import ServicesDep
from tinsmith.errors import UserError
from tinsmith.store.usage_rows import AuditRow

EventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]


class AuditEntry(Struct, omit_defaults=True):
    """event: `<resource>_<action>`. model_id and tinker_path repeat what the details of a checkpoint's events say."""

    timestamp: str
    event: str
    event_details: dict[str, str]
    model_id: str | None = None
    tinker_path: str | None = None


class AuditLog(Struct):
    entries: list[AuditEntry]


@get("/audit")
async def get_audit(
    request: Call, services: ServicesDep, event_type: FromQuery[EventType] = "all", day: FromQuery[str | None] = None
) -> AuditLog:
    """What was done to the caller's objects on one day in UTC, today by default; an administrator sees all tenants'."""
    start = _midnight(day)
    resource = None if event_type == "all" else event_type.removesuffix("s")
    tenant_id = None if request.user.is_admin else request.user.tenant_id
    end = (start + timedelta(days=1)).timestamp()
    rows = await services.work(services.store.audit.list, tenant_id, resource, start.timestamp(), end)
    return AuditLog([_entry(row) for row in rows])


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        timestamp=iso_time(row.at),
        event=row.event,
        event_details=row.details,
        model_id=row.details.get("model_id"),
        tinker_path=row.details.get("tinker_path"),
    )


def _midnight(day: str | None) -> datetime:
    try:
        found = datetime.fromtimestamp(time.time(), UTC).date() if day is None else date.fromisoformat(day)
        midnight = datetime(found.year, found.month, found.day, tzinfo=UTC)
        midnight + timedelta(days=1)  # the last day of the calendar has no end
    except (ValueError, OverflowError):
        raise UserError(f"day is a date such as 2026-01-31, not {str(day)[:40]!r}") from None
    return midnight
