"""The audit log of a day, in pages from its end. A page that isn't all of it begins with an entry that says so, as the
SDK shows entries alone."""

from __future__ import annotations

import re
import time
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Annotated, Literal

from litestar import get
from litestar.params import FromQuery, QueryParameter
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import iso_time
from tinsmith.api.services import ServicesDep
from tinsmith.errors import UserError, echo
from tinsmith.store.audit import LIST_AT_MOST
from tinsmith.store.usage_rows import AuditRow

CURSOR = re.compile(r"(\d{1,12}(?:\.\d{1,20})?)_(\d{1,18})")
EventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]


class AuditEntry(Struct, omit_defaults=True):
    """event: `<resource>_<action>`. model_id and tinker_path repeat what the details of a checkpoint's events say."""

    timestamp: str
    event: str
    event_details: dict[str, str]
    model_id: str | None = None
    tinker_path: str | None = None


class AuditLog(Struct, omit_defaults=True):
    """next_cursor: there are older entries; ask with it as `cursor`."""

    entries: list[AuditEntry]
    next_cursor: str | None = None


@get("/audit")
async def get_audit(
    request: Call,
    services: ServicesDep,
    event_type: FromQuery[EventType] = "all",
    day: FromQuery[str | None] = None,
    cursor: FromQuery[str | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=LIST_AT_MOST)] = LIST_AT_MOST,
) -> AuditLog:
    """What was done to the caller's objects on one day in UTC, today by default; an administrator sees all tenants'.

    The newest entries of the day, or of those before `cursor`, oldest first.
    """
    start = _midnight(day)
    resource = None if event_type == "all" else event_type.removesuffix("s")
    tenant_id = None if request.user.is_admin else request.user.tenant_id
    end = (start + timedelta(days=1)).timestamp()
    before = None if cursor is None else _place(cursor)
    ask = partial(services.store.audit.list, tenant_id, resource, start.timestamp(), end, before=before, limit=limit)
    page = await services.work(ask)
    entries = [_entry(row) for row in page.rows]
    if page.before is None:
        return AuditLog(entries)
    next_cursor = f"{page.before[0]!r}_{page.before[1]}"
    return AuditLog([_mark(entries[0].timestamp, resource or "organization", next_cursor), *entries], next_cursor)


def _mark(timestamp: str, resource: str, cursor: str) -> AuditEntry:
    how = f"there are older entries of this day: GET /api/v1/audit with cursor={cursor} shows them"
    return AuditEntry(timestamp, f"{resource}_log_cut", {"message": how, "cursor": cursor})


def _place(cursor: str) -> tuple[float, int]:
    found = CURSOR.fullmatch(cursor)
    if found is None:
        raise UserError(f"cursor is the next_cursor of a page, not {echo(cursor)}")
    return float(found[1]), int(found[2])


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
