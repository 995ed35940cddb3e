"""Usage by the hour, and what checkpoints take now. Costs are null: prices count for quotas alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from litestar import get
from litestar.params import FromQuery
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import iso_time
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.tokens import user_urn
from tinsmith.errors import TooLargeError, UserError
from tinsmith.store.rows import Principal
from tinsmith.store.usage_rows import StoredSpan, UsageKind, UsageRow
from tinsmith.types import TenantId
from tinsmith.validate.requests import check_metadata

HOUR_S = 3600
MAX_HOURS = 14 * 24
MAX_EVENTS = 100_000
GIGABYTE = 1e9


class EventInfo(Struct, omit_defaults=True):
    """`type` says which of the quantities is there.

    No storage is marked as free: it would be false everywhere, which is what clients take its absence for, and SDK
    releases before 0.31 refuse an answer in which it stands.
    """

    type: str
    token_count: int | None = None
    cached: bool | None = None
    count: int | None = None
    gigabyte_hours: float | None = None


class UsageEvent(Struct):
    """One hour of one kind of use; a day, where it is old. training_run_id: the run that was trained, sampled or
    stored, if any."""

    bucket_start: str
    bucket_end: str
    base_model: str
    user_id: str
    user_name: str
    session_id: str | None
    training_run_id: str | None
    project_id: str | None
    estimated_cost_usd: None
    effective_rate_usd_per_million_tokens: None
    effective_rate_usd_per_gigabyte_month: None
    event_info: EventInfo


class UsageSession(Struct):
    user_metadata: dict[str, str] | None


class UsageEvents(Struct):
    data: list[UsageEvent]
    sessions: dict[str, UsageSession]
    cost_data_through: None = None


class StorageItem(Struct):
    project_id: str | None
    org_user_urn: str
    user_email: None
    user_name: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: None


class StorageNow(Struct):
    data: list[StorageItem]
    effective_rate_usd_per_gigabyte_month: None = None


@get("/billing/usage/events")
async def get_usage(
    request: Call, services: ServicesDep, starting_on: FromQuery[str], ending_before: FromQuery[str]
) -> UsageEvents:
    """Tokens, checkpoints and storage by hour, run and kind, up to now; an administrator sees all tenants'."""
    start, end = _hour("starting_on", starting_on), _hour("ending_before", ending_before)
    if start >= end:
        raise UserError("ending_before must lie after starting_on")
    if end - start > MAX_HOURS * HOUR_S:
        raise UserError("a window holds at most 14 days: ask for several")
    if start > time.time():
        raise UserError("starting_on lies in the future")
    return await services.work(_usage, services, request.user, start, end)


@get("/billing/usage/checkpoints/current")
async def get_storage(request: Call, services: ServicesDep, project_id: FromQuery[str | None] = None) -> StorageNow:
    """What live checkpoints take, by tenant and project; an administrator sees all tenants'."""
    rows = await services.work(services.store.ledger.storage, _whose(request.user), project_id, time.time())
    return StorageNow(
        [
            StorageItem(
                project_id=row.project_id,
                org_user_urn=user_urn(row.tenant_id),
                user_email=None,
                user_name=row.tenant_name,
                checkpoint_count=row.num_checkpoints,
                size_bytes=row.size_bytes,
                size_gigabytes=row.size_bytes / GIGABYTE,
                estimated_monthly_cost_usd=None,
            )
            for row in rows
        ]
    )


def _usage(services: Services, principal: Principal, start: int, end: int) -> UsageEvents:
    ledger = services.store.ledger
    rows = ledger.usage(_whose(principal), start, end, MAX_EVENTS + 1)
    spans = ledger.spans(_whose(principal), start, end, MAX_EVENTS + 1)
    if len(rows) > MAX_EVENTS or len(spans) > MAX_EVENTS:
        raise TooLargeError(f"this window holds more than {MAX_EVENTS} events: ask for a shorter one")
    stored = storage_by_hour(spans, start, min(end, time.time()), MAX_EVENTS)
    events = [_event(row.hour, row, _info(row), row.seconds) for row in rows]
    events += [_event(hour, span, EventInfo("storage", gigabyte_hours=amount)) for hour, span, amount in stored]
    events.sort(key=lambda event: (event.bucket_start, -(event.event_info.token_count or 0)))
    seen = {event.session_id for event in events}
    both: list[UsageRow | StoredSpan] = [*rows, *spans]
    return UsageEvents(
        events,
        {
            row.session_id: UsageSession(check_metadata(row.user_metadata) or None)
            for row in both
            if row.session_id is not None and row.session_id in seen
        },
    )


def storage_by_hour(
    spans: Sequence[StoredSpan], start: int, end: float, max_events: int
) -> list[tuple[int, StoredSpan, float]]:
    """(hour, a span of the run, gigabyte-hours of all the run's checkpoints), for every hour in which a run had any.

    Raises:
        TooLargeError: more than `max_events`.
    """
    sums: defaultdict[tuple[int, str], float] = defaultdict(float)
    run_span = {span.run_id: span for span in spans}
    for span in spans:
        since = max(float(start), span.since)
        until = end if span.until is None else min(end, span.until)
        hour = int(since // HOUR_S) * HOUR_S
        while hour < until:
            overlap_s = min(until, hour + HOUR_S) - max(since, hour)
            if overlap_s > 0:
                sums[hour, span.run_id] += span.size_bytes / GIGABYTE * overlap_s / HOUR_S
            hour += HOUR_S
        if len(sums) > max_events:
            raise TooLargeError(f"this window holds more than {max_events} events: ask for a shorter one")
    return [(hour, run_span[run_id], amount) for (hour, run_id), amount in sorted(sums.items())]


def _info(row: UsageRow) -> EventInfo:
    match row.kind:
        case UsageKind.TRAINING:
            return EventInfo("training", token_count=row.quantity)
        case UsageKind.PREFILL:
            return EventInfo("sampling_prefill", token_count=row.quantity, cached=False)
        case UsageKind.PREFILL_CACHED:
            return EventInfo("sampling_prefill", token_count=row.quantity, cached=True)
        case UsageKind.SAMPLE:
            return EventInfo("sampling_sample", token_count=row.quantity)
        case UsageKind.CHECKPOINT:
            return EventInfo("checkpoint", count=row.quantity)


def _event(hour: int, row: UsageRow | StoredSpan, info: EventInfo, seconds: int = HOUR_S) -> UsageEvent:
    return UsageEvent(
        bucket_start=iso_time(hour),
        bucket_end=iso_time(hour + seconds),
        base_model=row.base_model,
        user_id=user_urn(row.tenant_id),
        user_name=row.tenant_name,
        session_id=row.session_id,
        training_run_id=row.run_id,
        project_id=row.project_id,
        estimated_cost_usd=None,
        effective_rate_usd_per_million_tokens=None,
        effective_rate_usd_per_gigabyte_month=None,
        event_info=info,
    )


def _whose(principal: Principal) -> TenantId | None:
    return None if principal.is_admin else principal.tenant_id


def _hour(name: str, text: str) -> int:
    """Unix seconds of a full hour; a time without a zone is in UTC."""
    try:
        found = datetime.fromisoformat(text)
        moment = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
        since = moment - datetime.fromtimestamp(0, UTC)
    except (ValueError, OverflowError):
        raise UserError(f"{name} is a time such as 2026-01-31T13:00:00Z, not {text[:60]!r}") from None
    if since % timedelta(hours=1) or since < timedelta(0) or moment.year > 9000:
        raise UserError(f"{name} must be a full hour in UTC, such as 2026-01-31T13:00:00Z, not {text[:60]!r}")
    return int(since.total_seconds())
