"""What `/metrics` reads when it is asked, in place of counting it: rows, the server's processes, the disk.

Reads block, so they are made in a thread, and at most every `FRESH_S`, however often somebody asks. Tenants that wait
are named up to a number, those with the most requests first; the others are one, named `other`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinsmith import __version__
from tinsmith.config import Settings
from tinsmith.files.datadir import DataDir, ServerInfo
from tinsmith.ipc.heartbeat import Ear
from tinsmith.observe import series
from tinsmith.observe.metrics import OTHER, Counting, Series
from tinsmith.store import Store
from tinsmith.store.figures import Figures, Waiting
from tinsmith.types import OpKind, RunStatus

FRESH_S = 0.5


class Watched:
    """All that this server counts and can read, as text. From any thread."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        counting: Counting,
        num_polls: Callable[[], int],
        disk: Callable[[], Mapping[str, int]],
        supervisor: Ear,
    ) -> None:
        """num_polls: that are open now. disk: bytes of the data directory by kind, as they are known."""
        self._reader = _Reader(store, settings, num_polls, disk, supervisor)
        self._counting = counting
        self._lock = threading.Lock()
        self._text = b""
        self._read_at = float("-inf")

    def text(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                self._text = self._counting.text(self._reader)
                self._read_at = time.monotonic()
            return self._text


class _Reader(Collector):
    def __init__(
        self,
        store: Store,
        settings: Settings,
        num_polls: Callable[[], int],
        disk: Callable[[], Mapping[str, int]],
        supervisor: Ear,
    ) -> None:
        self._store = store
        self._settings = settings
        self._num_polls = num_polls
        self._disk = disk
        self._supervisor = supervisor
        self._data_dir = DataDir(settings.data_dir)

    def describe(self) -> Iterable[Metric]:
        """Nothing is read only to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        now = time.time()
        yield _family(series.INFO, {(__version__,): 1})
        yield _family(series.OPEN_POLLS, {(): self._num_polls()})
        figures = self._store.overview.figures()
        yield from _of_rows(figures, self._settings.metrics_tenants, now)
        yield _family(series.HELD_OPS, self._held(figures, now))
        yield _family(series.QUEUE_OLDEST_FREE, self._oldest_free(figures, now))
        silent_s = self._supervisor.silent_s
        yield _family(series.SUPERVISOR_SILENT, {} if silent_s is None else {(): silent_s})
        info = self._data_dir.left_info()
        yield _family(series.WORKER_READY, self._ready({} if info is None else info.places, now))
        if info is not None:
            yield from _of_processes(info)
        yield _family(series.DISK_USED, {(kind,): size for kind, size in self._disk().items()})
        yield _family(series.DISK_FREE, {(): shutil.disk_usage(self._settings.data_dir).free})

    def _ready(self, places: Mapping[str, Sequence[str]], now: float) -> Mapping[tuple[str, ...], float]:
        """Of each worker that the server has a place for, which stays while its process is dead; and of those that
        have none there, for as long as their lease."""
        rows = self._store.workers.list()
        ready = {row.slot for row in rows if row.is_ready and row.lease_until > now}
        since = now if places else 0.0
        labels = {row.slot: (row.base_model, row.role.value) for row in rows if row.lease_until > since}
        labels |= {slot: (base_model, role) for slot, (base_model, role) in places.items()}
        return {(slot, *who): float(slot in ready) for slot, who in labels.items()}

    def _held(self, figures: Figures, now: float) -> Mapping[tuple[str, ...], int]:
        """For the tenants whose requests wait, by the names that their queues have."""
        held = self._store.quotas.num_held(now)
        named = named_tenants(figures.waiting, self._settings.metrics_tenants)
        shown: Counter[tuple[str, ...]] = Counter()
        for each in figures.waiting:
            shown[(each.tenant if each.tenant in named else OTHER,)] += 0
        for tenant_id, name in self._store.overview.tenant_names(held).items():
            shown[(name if name in named else OTHER,)] += held[tenant_id]
        return shown

    def _oldest_free(self, figures: Figures, now: float) -> Mapping[tuple[str, ...], float]:
        """Who has no request that a quota holds back waits for as long as its oldest."""
        free_since = self._store.quotas.free_since(now)
        names = self._store.overview.tenant_names(free_since)
        since = {names[tenant_id]: at for tenant_id, at in free_since.items() if tenant_id in names}
        waiting = [
            replace(each, oldest_at=since[each.tenant] or now) if each.tenant in since else each
            for each in figures.waiting
        ]
        _, oldest = by_tenant(waiting, self._settings.metrics_tenants, now)
        return {(tenant,): seconds for tenant, seconds in oldest.items()}


def _of_rows(figures: Figures, most_tenants: int, now: float) -> Iterator[Metric]:
    kinds: Counter[str] = Counter(dict.fromkeys((kind.value for kind in OpKind), 0))
    for waiting in figures.waiting:
        kinds[waiting.kind] += waiting.count
    yield _family(series.QUEUED_OPS, {(kind,): count for kind, count in kinds.items()})
    running = {kind.value: figures.running.get(kind.value, 0) for kind in OpKind}
    yield _family(series.RUNNING_OPS, {(kind,): count for kind, count in running.items()})
    depth, oldest = by_tenant(figures.waiting, most_tenants, now)
    yield _family(series.QUEUE_DEPTH, {(tenant,): count for tenant, count in depth.items()})
    yield _family(series.QUEUE_OLDEST, {(tenant,): seconds for tenant, seconds in oldest.items()})
    yield _family(series.RUNS, {(status.value,): figures.runs.get(status.value, 0) for status in RunStatus})
    yield _family(series.SNAPSHOTS, {(): figures.num_snapshots})
    yield _family(series.SNAPSHOTS_SIZE, {(): figures.snapshot_bytes})
    yield _family(series.CHECKPOINTS, {(kind,): count for kind, (count, _) in figures.checkpoints.items()})
    yield _family(series.CHECKPOINTS_SIZE, {(kind,): size for kind, (_, size) in figures.checkpoints.items()})
    yield _family(series.SESSIONS, {(): figures.num_sessions})


def named_tenants(waiting: Iterable[Waiting], most: int) -> set[str]:
    """The `most` that have the most requests."""
    depth: Counter[str] = Counter()
    for each in waiting:
        depth[each.tenant] += each.count
    return {tenant for tenant, _ in depth.most_common(most)}


def by_tenant(waiting: Sequence[Waiting], most: int, now: float) -> tuple[dict[str, int], dict[str, float]]:
    """(how many requests wait, how long the oldest has waited in seconds), by tenant: the `most` that have the most
    requests, and `other` for those beyond."""
    depth: Counter[str] = Counter()
    since: dict[str, float] = {}
    for each in waiting:
        depth[each.tenant] += each.count
        since[each.tenant] = min(since.get(each.tenant, now), each.oldest_at)
    named = named_tenants(waiting, most)
    shown: Counter[str] = Counter()
    oldest: dict[str, float] = {}
    for tenant, count in depth.items():
        label = tenant if tenant in named else OTHER
        shown[label] += count
        oldest[label] = max(oldest.get(label, 0.0), now - since[tenant])
    return dict(shown), oldest


def _of_processes(info: ServerInfo) -> Iterator[Metric]:
    pids = {"serve": info.pid, "api": info.api_pid}
    pids |= {name if name.startswith("sampler ") else f"worker {name}": pid for name, pid in info.worker_pids.items()}
    memory = {(name,): _resident_bytes(pid) for name, pid in pids.items()}
    yield _family(series.PROCESS_MEMORY, {labels: size for labels, size in memory.items() if size is not None})
    spent = {(name,): _cpu_seconds(pid) for name, pid in pids.items()}
    yield _family(series.PROCESS_CPU, {labels: seconds for labels, seconds in spent.items() if seconds is not None})
    yield _family(series.RESTARTS, {(name,): count for name, count in info.restarts.items()})


def _family(of: Series, values: Mapping[tuple[str, ...], float]) -> Metric:
    made = CounterMetricFamily if of.kind == "counter" else GaugeMetricFamily
    family = made(of.name, of.help, labels=of.labels)
    for labels, value in values.items():
        family.add_metric(labels, float(value))
    return family


def _resident_bytes(pid: int) -> int | None:
    """None where the system doesn't tell, or the process is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds(pid: int) -> float | None:
    """User and system time; None as above."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
