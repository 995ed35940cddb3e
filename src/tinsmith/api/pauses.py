"""Why a request that was accepted isn't done yet, as its client's polls are told: the queue state and a reason.

`paused_rate_limit`: a quota of its tenant or key holds it back. `paused_capacity`: others are served before it. Either
reason says how long, as far as that is known; the SDK shows both to its user.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tinsmith.api.pace import PACE_OVER_S, Pace
from tinsmith.store import Store
from tinsmith.store.quota_rules import Quota, duration, told
from tinsmith.store.rows import OpRow
from tinsmith.types import OpState

ACTIVE, RATE_LIMIT, CAPACITY = "active", "paused_rate_limit", "paused_capacity"


@dataclass(frozen=True, slots=True)
class Waiting:
    """state: one of the SDK's queue states. reason: shown to users. missing_seq: the first request of its run that has
    not arrived, if it waits for that."""

    state: str
    reason: str
    missing_seq: int | None = None


def why_waiting(store: Store, pace: Pace, op: OpRow, session_timeout_s: float, *, is_ready: bool) -> Waiting:
    """What an unfinished op waits for. Blocks. is_ready: its base has been loaded."""
    if not is_ready:
        return Waiting(ACTIVE, f"the base model {op.base_model} is still being loaded")
    if op.state is OpState.RUNNING:
        return Waiting(ACTIVE, "running")
    places, now = store.places, time.time()
    ahead = places.ahead(op.id)
    if ahead is None:
        return Waiting(ACTIVE, "running")
    if ahead.missing is not None:
        reason = f"request {ahead.missing} of this run has not arrived, and this one is number {op.seq_id}"
        return Waiting(ACTIVE, reason, ahead.missing)
    hold = store.quotas.hold_of(op, now)
    if hold is not None:
        seconds_left = None
        if hold.quota in (Quota.REQUESTS, Quota.QUEUED_TOKENS):
            num = ahead.by_tenant.get(op.tenant_id, 0) + 1
            seconds_left = pace.seconds_for(num, places, op.base_model, op.tenant_id)
        return Waiting(RATE_LIMIT, told(hold, now, session_timeout_s, seconds_left))
    paused = store.quotas.paused([of for of in ahead.by_tenant if of != op.tenant_id], now)
    num = sum(count for of, count in ahead.by_tenant.items() if of not in paused)
    if num == 0:
        return Waiting(ACTIVE, "next in the queue")
    counted = f"at least {num}" if ahead.is_more else str(num)
    reason = f"{counted} request{'s' if num > 1 else ''} ahead in the queue"
    if num == ahead.num_own:
        return Waiting(ACTIVE, reason)
    seconds = pace.seconds_for(num, places, op.base_model)
    if seconds is None:
        return Waiting(CAPACITY, f"{reason}, and none has ended in the last {PACE_OVER_S:.0f} s")
    return Waiting(CAPACITY, f"{reason}, about {duration(seconds)} at the present pace")
