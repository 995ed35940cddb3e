"""How figures are counted for Prometheus: series that cost nothing until `start`, and then half a microsecond each.

The series themselves are in `series`. What stays true:

* Importing this counts nothing. A process that was not started under a place counts nothing either.
* What is counted goes to the files at each `flush`, a few times a second: so much is lost with a killed process.
* The processes of a server share a directory, one set of files for each place (the API, a worker's slot). A process
  that is started again in a place goes on with that place's files: counters go on, and there are never more files.
  No two processes write to one place at a time.
  After `kill -9` at any moment the files can be read: a count is one aligned write into mapped memory.
* The values of labels are few: names of routes and codes of ours, and of tenants the first few (`TenantLabels`).
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import prometheus_client
from prometheus_client import CollectorRegistry, exposition, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from tinsmith.errors import ConfigError

MEDIA = exposition.CONTENT_TYPE_PLAIN_0_0_4
OTHER = "other"
MAX_BESIDE = 8  # processes that count in a place and beside it
MAX_NAMES = 4096  # of tenants that are remembered, whether or not they have a label of their own


class Series:
    """One series as Prometheus sees it. Those of this class itself are read when they are asked for."""

    kind = "gauge"

    def __init__(self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = ()) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self.buckets = buckets

    @property
    def family(self) -> str:
        """Its name without what Prometheus' text adds to counters."""
        return self.name.removesuffix("_total")


class ReadCounter(Series):
    """A counter that is read when it is asked for."""

    kind = "counter"


class Meter(Series, ABC):
    """A series that this process counts in. What was counted is kept in memory until the next `flush`."""

    def __init__(self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = ()) -> None:
        super().__init__(name, help, *labels, buckets=buckets)
        self._made: Any = None
        self._lock = threading.Lock()
        self._counting: Counting | None = None
        self._pending: dict[tuple[str, ...], Any] = {}
        self._children: dict[tuple[str, ...], Any] = {}

    def start(self, counting: Counting) -> None:
        self._counting, self._made = counting, self._make(counting.registry)

    def stop(self) -> None:
        with self._lock:
            self._counting = self._made = None
            self._pending, self._children = {}, {}

    def flush(self) -> None:
        """What was counted until now may be read by all processes."""
        with self._lock:
            pending, self._pending = self._pending, {}
            for labels, counted in pending.items():
                child = self._children.get(labels)
                if child is None:
                    child = self._children[labels] = self._made.labels(*labels) if labels else self._made
                self._put(child, counted)

    def publish(self, every_s: float = 0.0) -> None:
        """See `Counting.flush`: this and all others that are counted with it."""
        if self._counting is not None:
            self._counting.flush(every_s)

    def kept(self, label: str) -> set[str]:
        """Values of a label that this process's place has counted under, in this process and those before it."""
        return set() if self._counting is None else self._counting.kept(label)

    @abstractmethod
    def _make(self, registry: CollectorRegistry) -> Any:
        """The library's own series."""

    @abstractmethod
    def _put(self, child: Any, counted: Any) -> None:
        """Give what was counted to one of the library's children."""


class Counter(Meter):
    """`first`: values of its one label that are there, as 0, before anything is counted.

    Prometheus sees no increase in a series that begins with 1, so an alert about the first of its kind needs it.
    """

    kind = "counter"

    def __init__(self, name: str, help: str, *labels: str, first: tuple[str, ...] = ()) -> None:
        super().__init__(name, help, *labels)
        self.first = first

    def start(self, counting: Counting) -> None:
        super().start(counting)
        for value in self.first:
            self.add(value, by=0.0)

    def add(self, *labels: str, by: float = 1.0) -> None:
        if self._made is not None:
            with self._lock:
                self._pending[labels] = self._pending.get(labels, 0.0) + by

    def _make(self, registry: CollectorRegistry) -> Any:
        return prometheus_client.Counter(self.name, self.help, self.labels, registry=registry)

    def _put(self, child: Any, counted: Any) -> None:
        child.inc(counted)


class Gauge(Meter):
    def set(self, value: float, *labels: str) -> None:
        if self._made is not None:
            with self._lock:
                self._pending[labels] = value

    def _make(self, registry: CollectorRegistry) -> Any:
        return prometheus_client.Gauge(
            self.name, self.help, self.labels, registry=registry, multiprocess_mode="livesum"
        )

    def _put(self, child: Any, counted: Any) -> None:
        child.set(counted)


class Histogram(Meter):
    kind = "histogram"

    def observe(self, value: float, *labels: str) -> None:
        if self._made is not None:
            bucket = bisect_left(self.buckets, value)
            with self._lock:
                counted = self._pending.get(labels)
                if counted is None:
                    counted = self._pending[labels] = [0.0] * (len(self.buckets) + 2)
                counted[bucket] += 1
                counted[-1] += value

    def _make(self, registry: CollectorRegistry) -> Any:
        return prometheus_client.Histogram(self.name, self.help, self.labels, buckets=self.buckets, registry=registry)

    def _put(self, child: Any, counted: Any) -> None:
        for bucket, count in zip(child._buckets, counted[:-1], strict=True):
            if count:
                bucket.inc(count)
        child._sum.inc(counted[-1])


class Counting:
    """What a process counts, from `start` until `stop`."""

    def __init__(self, meters: Iterable[Series], place: str, directory: Path | None) -> None:
        """directory: shared with the other processes of the server, and what the environment of this one names;
        None: the process counts for itself alone."""
        self._meters = [meter for meter in meters if isinstance(meter, Meter)]
        self._place = place.replace("_", "-")
        self._directory = directory
        self._held: BinaryIO | None = None
        self._flushed_at = float("-inf")
        self.registry = CollectorRegistry()

    def start(self) -> None:
        """From now on the meters count here.

        Raises:
            ConfigError: too many processes count in this place.
        """
        self.registry = CollectorRegistry()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        if self._directory is None:
            values.ValueClass = values.MutexValue
        else:
            self._place = self._hold(self._directory)
            for gauge in self._directory.glob(f"gauge_*_{self._place}.db"):
                gauge.unlink()  # of the process that was here before
            values.ValueClass = values.MultiProcessValue(lambda: self._place)  # type: ignore[no-untyped-call]
        for meter in self._meters:
            meter.start(self)

    def stop(self) -> None:
        for meter in self._meters:
            meter.stop()
        if self._held is not None:
            self._held.close()

    def flush(self, every_s: float = 0.0) -> None:
        """What was counted until now may be read by all processes; if it is so long ago that this was said."""
        now = time.monotonic()
        if now - self._flushed_at >= every_s:
            self._flushed_at = now
            for meter in self._meters:
                meter.flush()

    def _hold(self, directory: Path) -> str:
        """A place that no living process counts in: this one's, or one beside it while its predecessor still works."""
        for name in (self._place, *(f"{self._place}-{number}" for number in range(1, MAX_BESIDE))):
            self._held = (directory / f"{name}.lock").open("ab")
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._held.close()
            else:
                return name
        raise ConfigError(f"{MAX_BESIDE} processes count as {self._place}: stop those that were left")

    def kept(self, label: str) -> set[str]:
        """See `Meter.kept`; of all series."""
        found: set[str] = set()
        for path in [] if self._directory is None else self._directory.glob(f"*_{self._place}.db"):
            for key, *_ in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]
                value = json.loads(key)[2].get(label)
                found |= set() if value is None else {value}
        return found

    def text(self, read: Collector | None = None) -> bytes:
        """All that the processes of this server have counted, and what `read` finds now, in Prometheus' text format."""
        self.flush()
        registry = self.registry
        if self._directory is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self._directory))  # type: ignore[no-untyped-call]
        answer = exposition.generate_latest(registry)
        if read is not None:
            now = CollectorRegistry()
            now.register(read)
            answer += exposition.generate_latest(now)
        return answer


class TenantLabels:
    """Names of tenants as values of a label: the first `most` that are met, `other` for all after them.

    Who has a label keeps it, so that no counter ever moves from one to another.
    """

    def __init__(self, most: int, name_of: Callable[[str], str], kept: Iterable[str] = ()) -> None:
        """name_of: a tenant's name by its id. kept: those that had a label before this process began."""
        self._most = most
        self._name_of = name_of
        self._named = set(kept) - {OTHER}
        self._labels: dict[str, str] = {}
        self._lock = threading.Lock()

    def __getitem__(self, tenant_id: str) -> str:
        label = self._labels.get(tenant_id)
        return self._choose(tenant_id) if label is None else label

    def _choose(self, tenant_id: str) -> str:
        with self._lock:
            name = self._name_of(tenant_id)
            if name not in self._named and len(self._named) >= self._most:
                name = OTHER
            else:
                self._named.add(name)
            if len(self._labels) >= MAX_NAMES:
                self._labels.clear()
            self._labels[tenant_id] = name
            return name
