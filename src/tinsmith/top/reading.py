"""From two readings of `/metrics` to what a screen says: pure, times included.

Knows names of series and no terminal. Rates are differences of counters between the readings; a counter that fell was
begun anew, and counts from zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tinsmith.observe import series
from tinsmith.observe.metrics import Series

TOKEN_KINDS = ("trained", "prefilled", "cached", "sampled")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server said at one moment. at: seconds, of any clock. runs: of `/api/v1/admin/runs`."""

    at: float
    values: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]
    runs: Sequence[Mapping[str, Any]] = ()

    def of(self, one: Series, suffix: str = "") -> Mapping[tuple[tuple[str, str], ...], float]:
        return self.values.get(one.name + suffix, {})


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """busy: share of the time, None if it can't be told yet. kv_used, kv_total: bytes."""

    name: str
    is_ready: bool
    busy: float | None
    memory_bytes: int
    num_runs: int
    num_samples: int
    kv_used: int
    kv_total: int
    restarts: int


@dataclass(frozen=True, slots=True)
class TenantLine:
    """oldest_s: how long its oldest waiting request has waited. Tokens a second."""

    name: str
    waiting: int
    oldest_s: float
    trained: float
    sampled: float
    wait_s: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """One screen's worth. Means and quantiles are of what ended between the readings, None if nothing did."""

    version: str
    tokens: dict[str, float]
    ops: float
    refused: float
    waiting: int
    oldest_s: float
    running: int
    num_polls: int
    passes: float
    pass_runs: float | None
    pass_tenants: float | None
    pass_tokens: float | None
    pass_s: float | None
    first_token_s: float | None
    wait_s: float | None
    http_s: float | None
    num_sessions: int
    num_runs: int
    num_corrupted: int
    num_snapshots: int
    snapshot_bytes: int
    disk: dict[str, int]
    disk_free: int
    memory: dict[str, int]
    restarts: dict[str, int]
    workers: list[WorkerLine] = field(default_factory=list)
    tenants: list[TenantLine] = field(default_factory=list)
    runs: Sequence[Mapping[str, Any]] = ()


def parse(text: str, at: float, runs: Sequence[Mapping[str, Any]] = ()) -> Reading:
    """Raises: ValueError: the text is not Prometheus'."""
    values: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return Reading(at, dict(values), runs)


def frame(before: Reading, now: Reading) -> Frame:
    """What there is at `now`, and what happened since `before`."""
    seconds = max(1e-9, now.at - before.at)

    def rate(one: Series, **labels: str) -> float:
        return grown(before, now, one, **labels) / seconds

    waiting = _by(now, series.QUEUE_DEPTH, "tenant")
    oldest = _by(now, series.QUEUE_OLDEST, "tenant")
    statuses = _by(now, series.RUNS, "status")
    return Frame(
        version=next((dict(labels).get("version", "") for labels in now.of(series.INFO)), ""),
        tokens={kind: rate(series.TOKENS, kind=kind) for kind in TOKEN_KINDS},
        ops=rate(series.OPS),
        refused=rate(series.REFUSED),
        waiting=int(sum(waiting.values())),
        oldest_s=max(oldest.values(), default=0.0),
        running=int(sum(now.of(series.RUNNING_OPS).values())),
        num_polls=int(_sum(now, series.OPEN_POLLS)),
        passes=grown(before, now, series.PASS_SECONDS, "_count") / seconds,
        pass_runs=mean(before, now, series.PASS_RUNS),
        pass_tenants=mean(before, now, series.PASS_TENANTS),
        pass_tokens=mean(before, now, series.PASS_TOKENS),
        pass_s=mean(before, now, series.PASS_SECONDS),
        first_token_s=quantile(before, now, series.SAMPLE_FIRST, 0.95),
        wait_s=quantile(before, now, series.QUEUE_WAIT, 0.95),
        http_s=quantile(before, now, series.HTTP_SECONDS, 0.95, "retrieve_future"),
        num_sessions=int(_sum(now, series.SESSIONS)),
        num_runs=int(sum(statuses.values())),
        num_corrupted=int(statuses.get("corrupted", 0)),
        num_snapshots=int(_sum(now, series.SNAPSHOTS)),
        snapshot_bytes=int(_sum(now, series.SNAPSHOTS_SIZE)),
        disk={kind: int(size) for kind, size in _by(now, series.DISK_USED, "kind").items()},
        disk_free=int(_sum(now, series.DISK_FREE)),
        memory={name: int(size) for name, size in _by(now, series.PROCESS_MEMORY, "process").items()},
        restarts={name: int(count) for name, count in _by(now, series.RESTARTS, "process").items()},
        workers=_workers(before, now, seconds),
        tenants=_tenants(before, now, seconds, waiting, oldest),
        runs=now.runs,
    )


def grown(before: Reading, now: Reading, one: Series, suffix: str = "", **labels: str) -> float:
    """By how much counters grew, all those with these labels together."""
    wanted = set(labels.items())
    earlier = before.of(one, suffix)
    total = 0.0
    for key, value in now.of(one, suffix).items():
        if wanted <= set(key):
            was = earlier.get(key, 0.0)
            total += value - was if value >= was else value
    return total


def mean(before: Reading, now: Reading, one: Series) -> float | None:
    count = grown(before, now, one, "_count")
    return grown(before, now, one, "_sum") / count if count else None


def quantile(before: Reading, now: Reading, one: Series, share: float, without: str = "") -> float | None:
    """The bound below which that share of what was observed lies: the upper edge of a bucket, or its last finite one.

    without: leave out what has this in a label.
    """
    counts: dict[float, float] = defaultdict(float)
    earlier = before.of(one, "_bucket")
    for key, value in now.of(one, "_bucket").items():
        labels = dict(key)
        bound = float(labels.pop("le"))
        if without and any(without in text for text in labels.values()):
            continue
        was = earlier.get(key, 0.0)
        counts[bound] += value - was if value >= was else value
    total = counts.get(math.inf, 0.0)
    if not total:
        return None
    return next((bound for bound in sorted(counts) if counts[bound] >= share * total and bound != math.inf), math.inf)


def _workers(before: Reading, now: Reading, seconds: float) -> list[WorkerLine]:
    memory, restarts = _by(now, series.PROCESS_MEMORY, "process"), _by(now, series.RESTARTS, "process")
    used, free = _by(now, series.KV_USED, "worker"), _by(now, series.KV_FREE, "worker")
    runs, samples = _by(now, series.RESIDENT_RUNS, "worker"), _by(now, series.RESIDENT_SAMPLES, "worker")
    lines: list[WorkerLine] = []
    for key, is_ready in sorted(now.of(series.WORKER_READY).items()):
        labels = dict(key)
        slot = labels["worker"]
        name = _process_of(slot, labels.get("base_model", ""), labels.get("role", ""))
        busy_s = grown(before, now, series.WORKER_BUSY, worker=slot)
        lines.append(
            WorkerLine(
                name=name,
                is_ready=bool(is_ready),
                busy=min(1.0, busy_s / seconds) if busy_s or now.at > before.at else None,
                memory_bytes=int(memory.get(name, 0)),
                num_runs=int(runs.get(slot, 0)),
                num_samples=int(samples.get(slot, 0)),
                kv_used=int(used.get(slot, 0)),
                kv_total=int(used.get(slot, 0) + free.get(slot, 0)),
                restarts=int(restarts.get(name, 0)),
            )
        )
    return lines


def _process_of(slot: str, base_model: str, role: str) -> str:
    """What the server calls a worker's process; of several of a base, the second is in a slot that ends with -2."""
    nth = slot.partition("-")[2]
    return f"{'sampler' if role == 'sample' else 'worker'} {base_model}" + (f" {nth}" if nth.isdigit() else "")


def _tenants(
    before: Reading, now: Reading, seconds: float, waiting: Mapping[str, float], oldest: Mapping[str, float]
) -> list[TenantLine]:
    counted = {dict(key).get("tenant", "") for key in now.of(series.TENANT_TOKENS)}
    lines = []
    for name in counted | set(waiting):
        trained = grown(before, now, series.TENANT_TOKENS, tenant=name, kind="trained") / seconds
        sampled = grown(before, now, series.TENANT_TOKENS, tenant=name, kind="sampled") / seconds
        count = grown(before, now, series.TENANT_WAIT, "_count", tenant=name)
        wait_s = grown(before, now, series.TENANT_WAIT, "_sum", tenant=name) / count if count else None
        lines.append(TenantLine(name, int(waiting.get(name, 0)), oldest.get(name, 0.0), trained, sampled, wait_s))
    return sorted(lines, key=lambda line: (-(line.trained + line.sampled), -line.waiting, line.name))


def _by(now: Reading, one: Series, label: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for key, value in now.of(one).items():
        found[dict(key).get(label, "")] += value
    return dict(found)


def _sum(now: Reading, one: Series) -> float:
    return sum(now.of(one).values())
