"""Why a request that was accepted isn't done yet, as its client's polls are told: the queue state and a reason.

`paused_rate_limit`: a quota of its tenant or key holds it back. `paused_capacity`: others are served before it, or have
the places that it needs. Either reason says how long, as far as that is known; the SDK shows both to its user.
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
AFTER_S = 2.0  # of waiting as the next one, it isn't the worker's next look that is waited for
NONE_ENDED = f"none has ended in the last {PACE_OVER_S:.0f} s"


@dataclass(frozen=True, slots=True)
class Waiting:
    """state: one of the SDK's queue states. reason: shown to users. missing_seq: the first request of its run that has
    not arrived, if it waits for that. cause: which quota of whom, if one holds it back."""

    state: str
    reason: str
    missing_seq: int | None = None
    cause: str = ""


def why_waiting(store: Store, pace: Pace, op: OpRow, session_timeout_s: float, *, is_ready: bool) -> Waiting:
    """What an unfinished op waits for. Blocks. is_ready: its base has been loaded."""
    if not is_ready:
        return Waiting(ACTIVE, f"the base model {op.base_model} is still being loaded")
    if op.state is OpState.RUNNING:
        return Waiting(ACTIVE, "running")
    places, now = store.places, time.time()
    queue = pace.queue(places, op.base_model)
    place = pace.place(places, op)
    if place is None:
        return Waiting(ACTIVE, "running")
    if place.missing is not None:
        reason = f"request {place.missing} of this run has not arrived, and this one is number {op.seq_id}"
        return Waiting(ACTIVE, reason, place.missing)
    ahead = queue.ahead(place.num)
    hold = pace.hold(store.quotas, op)
    if hold is not None:
        seconds_left = None
        if hold.quota in (Quota.REQUESTS, Quota.QUEUED_TOKENS):
            seconds_left = pace.seconds_for(ahead.get(op.tenant_id, 0) + 1, places, op.base_model, op.tenant_id)
        reason = told(hold, now, session_timeout_s, seconds_left)
        return Waiting(RATE_LIMIT, reason, cause=f"{hold.quota} {hold.owner}")
    paused = store.quotas.paused([of for of in ahead if of != op.tenant_id], now)
    num = sum(count for of, count in ahead.items() if of not in paused)
    own = op.run_id or op.sampler_id or ""
    if num == 0:
        return _why_first(store, pace, op, own, now)
    reason = f"{_requests(num)} ahead in the queue"
    if num == queue.num_own(place.num, own):
        return Waiting(ACTIVE, reason)
    seconds = pace.seconds_for(num, places, op.base_model)
    if seconds is None:
        return Waiting(CAPACITY, f"{reason}, and {NONE_ENDED}")
    return Waiting(CAPACITY, f"{reason}, about {duration(seconds)} at the present pace")


def _why_first(store: Store, pace: Pace, op: OpRow, own: str, now: float) -> Waiting:
    """What nobody stands before waits for: places that others' requests have which are computed."""
    running = {} if now - op.created_at < AFTER_S else pace.running(store.places, op.base_model)
    if not running or own in running:
        return Waiting(ACTIVE, "next in the queue")
    num = sum(running.values())
    reason = f"first in the queue, behind {_requests(num)} of others that {'are' if num > 1 else 'is'} being computed"
    seconds = pace.seconds_for(1, store.places, op.base_model)
    if seconds is None:
        return Waiting(CAPACITY, f"{reason}, and {NONE_ENDED}")
    return Waiting(CAPACITY, f"{reason}; at the present pace one ends in about {duration(seconds)}")


def _requests(num: int) -> str:
    return f"{num} request{'s' if num > 1 else ''}"
