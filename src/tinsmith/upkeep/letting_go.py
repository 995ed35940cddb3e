"""What goes by its age, where the operator wants it: runs that nobody touches, old audit entries, hours of usage.

Every call is harmless at any time and in any number of processes: the rows decide, each in its own transaction.
"""

from __future__ import annotations

import time

import structlog

from tinsmith.config import Settings
from tinsmith.crashpoints import crash_point
from tinsmith.observe import series
from tinsmith.store import Store
from tinsmith.store.gone import IDLE
from tinsmith.types import RunId

log = structlog.get_logger("tinsmith.janitor")

AT_ONCE = 100  # runs of one look
PAGE = 1000  # rows of one transaction
ROUND_S = 5.0  # which ends sooner if it takes so long


def sweep_old(store: Store, settings: Settings, now: float, *, seeks_idle: bool = True) -> int:
    """One round; how many runs were let go. `now`: unix seconds. seeks_idle: look at all runs for those to let go."""
    until = time.monotonic() + ROUND_S
    is_wanted = seeks_idle and settings.run_ttl_s > 0
    num_let_go = let_idle_go(store, now - settings.run_ttl_s, now, until) if is_wanted else 0
    clear(store, now, until)
    if settings.audit_ttl_s:
        while (num := store.audit.trim(now - settings.audit_ttl_s, PAGE)) > 0:
            series.TRIMMED.add("audit", by=num)
            if num < PAGE or time.monotonic() > until:
                break
    if settings.usage_hours_s:
        while (num := store.ledger.move_old(now - settings.usage_hours_s, PAGE)) > 0:
            series.TRIMMED.add("usage", by=num)
            if num < PAGE or time.monotonic() > until:
                break
    return num_let_go


def let_idle_go(store: Store, before: float, now: float, until: float) -> int:
    """Begin to let go runs that nobody has touched since `before`, until `until` (monotonic); how many."""
    num, above = 0, RunId("")
    while time.monotonic() < until:
        found = store.gone.idle(before, now, above, AT_ONCE)
        for tenant_id, run_id in found:
            if store.gone.let_go(tenant_id, run_id, before, now):
                num += 1
                series.LET_GO.add(IDLE)
                log.info("run let go", run_id=run_id, tenant_id=tenant_id)
                crash_point("gone.after_mark")
            above = run_id
        if len(found) < AT_ONCE:
            break
    return num


def clear(store: Store, now: float, until: float) -> None:
    """Drop files and logs of runs that were let go or deleted, some at a time until `until` (monotonic)."""
    above = RunId("")
    while time.monotonic() < until:
        found = store.gone.going(above, AT_ONCE)
        for run_id in found:
            series.LET_GO_BYTES.add(by=store.gone.clear(run_id, now))
            above = run_id
        if len(found) < AT_ONCE:
            return
