"""What a worker tells of its work: counts as outcomes are recorded, and levels a few times a second.

Only what is new counts: requests that are computed again after a crash count as replayed, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tinsmith.config import Settings
from tinsmith.engine import Engine
from tinsmith.observe import series, tracing
from tinsmith.observe.metrics import TenantLabels
from tinsmith.store import Store
from tinsmith.store.usage_rows import Usage
from tinsmith.types import OpState, TenantId
from tinsmith.worker.outcomes import Outcome

LEVELS_EVERY_S = 0.25


class Watch:
    """For the loop's thread; `recorded` and `use` for any."""

    def __init__(self, slot: str, store: Store, engine: Engine, settings: Settings) -> None:
        self._slot = slot
        self._settings = settings
        self._engine = engine
        kept = series.TENANT_TOKENS.kept("tenant")
        self._tenants = TenantLabels(
            settings.metrics_tenants, lambda tenant: store.overview.tenant_name(TenantId(tenant)), kept
        )
        self._levels_at = float("-inf")
        self._busy_s = 0.0

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """They are on disk now."""
        now = time.time()
        for outcome in outcomes:
            op, finished = outcome.op, outcome.finished
            code = "" if finished.failure is None else finished.failure.code
            series.OPS.add(op.kind, finished.state)
            if code:
                series.FAILED_OPS.add(code)
            tracing.op(op, finished.state, code, now)
            series.OP_SECONDS.observe(max(0.0, now - op.created_at), op.kind)
            if op.started_at is not None:
                wait_s = max(0.0, op.started_at - op.created_at)
                series.QUEUE_WAIT.observe(wait_s, op.kind)
                series.TENANT_WAIT.observe(wait_s, self._tenants[op.tenant_id])
            if finished.usage is not None and finished.state is OpState.DONE:
                self.use(op.tenant_id, finished.usage)

    def use(self, tenant_id: TenantId, usage: Usage) -> None:
        """So much was computed for a tenant."""
        counts = (
            ("trained", usage.trained_tokens),
            ("prefilled", usage.prefill_tokens),
            ("cached", usage.cached_tokens),
            ("sampled", usage.sampled_tokens),
        )
        for kind, count in counts:
            if count:
                series.TOKENS.add(kind, by=count)
                series.TENANT_TOKENS.add(self._tenants[tenant_id], kind, by=count)

    def levels(self, num_runs: int, busy_s: float) -> None:
        """How full the engine is, if that was not said a moment ago. num_runs: in its memory; busy_s: it has computed
        for so long."""
        now = time.monotonic()
        if now - self._levels_at < LEVELS_EVERY_S:
            return
        self._levels_at = now
        series.WORKER_BUSY.add(self._slot, by=max(0.0, busy_s - self._busy_s))
        self._busy_s = busy_s
        used, total = self._engine.kv_bytes
        series.KV_USED.set(used, self._slot)
        series.KV_FREE.set(max(0, total - used), self._slot)
        series.BASE_BYTES.set(self._engine.base_bytes, self._slot)
        series.RESIDENT_RUNS.set(num_runs, self._slot)
        series.RESIDENT_RUN_BYTES.set(self._engine.runs_bytes, self._slot)
        series.MAX_RUNS.set(self._settings.max_resident_runs, self._slot)
        series.MAX_RUN_BYTES.set(self._settings.resident_runs_mib * 2**20, self._slot)
        seated, seats = self._engine.seats
        series.SEATED.set(seated, self._slot)
        series.SEATS.set(seats, self._slot)
        series.RESIDENT_SAMPLES.set(self._engine.num_samples, self._slot)
        series.RESIDENT_SAMPLES.publish()
