"""Where a request stands in its queue, and how fast that moves: looked up once for all who ask in a moment.

Thousands of polls end every second where thousands are open, and each wants to know. What was looked up holds for
`REST` times as long as the look took, so that looking takes little of the time however long the queue is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from tinsmith.store.places import Place, Places
from tinsmith.store.quota_rules import Hold
from tinsmith.store.quotas import Quotas
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, TenantId

PACE_OVER_S = 30.0
PACE_TTL_S = 2.0
REST = 100
MAX_REST_S = 4.0
MIN_REST_S = 0.5  # of what is asked for by itself, by each
MAX_HOLDS = 10_000

T = TypeVar("T")


@dataclass(slots=True)
class _Kept(Generic[T]):
    value: T
    until: float


class Queue:
    """What waits for one base, by arrival."""

    def __init__(self, rows: Sequence[tuple[OpId, Place, TenantId, str]]) -> None:
        """(id, place, tenant, run or sampler) of each."""
        self._tenants: dict[TenantId, int] = {}
        self._owns: dict[str, int] = {}
        self.places = {op_id: place for op_id, place, _, _ in rows}
        self._nums = np.array([place.num for _, place, _, _ in rows], np.int64)
        self._by = np.array([self._tenants.setdefault(of, len(self._tenants)) for _, _, of, _ in rows], np.int64)
        self._of = np.array([self._owns.setdefault(own, len(self._owns)) for _, _, _, own in rows], np.int64)

    def ahead(self, num: int) -> dict[TenantId, int]:
        """How many requests of each tenant came before that one; of those that have any."""
        counts = np.bincount(self._by[: self._at(num)], minlength=len(self._tenants))
        return {tenant_id: int(counts[code]) for tenant_id, code in self._tenants.items() if counts[code]}

    def num_own(self, num: int, own: str) -> int:
        """How many of them are of its own run or sampler."""
        code = self._owns.get(own)
        return 0 if code is None else int(np.count_nonzero(self._of[: self._at(num)] == code))

    def _at(self, num: int) -> int:
        return int(np.searchsorted(self._nums, num))


class Pace:
    """For any thread: two that look at once do so twice, and that is all."""

    def __init__(self) -> None:
        self._queues: dict[str, _Kept[Queue]] = {}
        self._running: dict[str, _Kept[dict[str, int]]] = {}
        self._holds: dict[str, _Kept[Hold | None]] = {}
        self._ready: _Kept[AbstractSet[str]] | None = None
        self._ended: _Kept[dict[tuple[str, TenantId], int]] | None = None

    def knows(self, op: OpRow) -> bool:
        """Whether a waiting request's place is known from a moment ago, so that telling it takes next to nothing."""
        kept = self._queues.get(op.base_model)
        return kept is not None and time.monotonic() <= kept.until and op.id in kept.value.places

    def place(self, places: Places, op: OpRow) -> Place | None:
        """Of a waiting request, as it was a moment ago; None: it isn't queued."""
        kept = self._queues.get(op.base_model)
        known = kept.value.places.get(op.id) if kept is not None and time.monotonic() <= kept.until else None
        return known or places.of(op.id)

    def is_ready(self, base: str, ready_bases: Callable[[], AbstractSet[str]]) -> bool:
        """Whether a base has been loaded, as of a moment ago."""
        if self._ready is None or time.monotonic() > self._ready.until:
            self._ready = _Kept(ready_bases(), time.monotonic() + MIN_REST_S)
        return base in self._ready.value

    def queue(self, places: Places, base: str) -> Queue:
        """What waits for the base, as it was a moment ago."""
        kept = self._queues.get(base)
        if kept is None or time.monotonic() > kept.until:
            kept = self._queues[base] = _look(lambda: Queue(places.queue(base)))
        return kept.value

    def running(self, places: Places, base: str) -> dict[str, int]:
        """How many requests of each run or sampler of the base were computed a moment ago."""
        kept = self._running.get(base)
        if kept is None or time.monotonic() > kept.until:
            kept = self._running[base] = _look(lambda: places.running(base))
        return kept.value

    def hold(self, quotas: Quotas, op: OpRow) -> Hold | None:
        """Why a quota holds back a waiting request, or others of its run or sampler do, as it was a moment ago."""
        own = op.run_id or op.sampler_id or ""
        kept = self._holds.get(own)
        if kept is None or time.monotonic() > kept.until:
            if len(self._holds) >= MAX_HOLDS:
                self._holds.clear()
            kept = self._holds[own] = _look(lambda: quotas.hold_of(op, time.time()))
            kept.until = max(kept.until, time.monotonic() + MIN_REST_S)
        return kept.value

    def seconds_for(self, num: int, places: Places, base: str, tenant_id: TenantId | None = None) -> float | None:
        """How long so many requests of a base take at the pace of the last `PACE_OVER_S`, of a tenant's own if it is
        named; None: none has ended."""
        if self._ended is None or time.monotonic() > self._ended.until:
            ended = places.ended_since(time.time() - PACE_OVER_S)
            self._ended = _Kept(ended, time.monotonic() + PACE_TTL_S)
        counts = self._ended.value.items()
        num_ended = sum(count for (of_base, of), count in counts if of_base == base and tenant_id in (None, of))
        return num * PACE_OVER_S / num_ended if num_ended else None


def _look(look: Callable[[], T]) -> _Kept[T]:
    started = time.monotonic()
    value = look()
    ended = time.monotonic()
    return _Kept(value, ended + min(MAX_REST_S, REST * (ended - started)))
