"""Counting: what is lost with a process and what is not, how many files there are, whose names become labels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tinsmith.api.figures import by_tenant
from tinsmith.config import METRICS_DIR
from tinsmith.observe import series
from tinsmith.observe.metrics import Counter, Counting, Gauge, Histogram, Meter, TenantLabels
from tinsmith.store.figures import Waiting

KILLED = """
import os, signal, sys
from pathlib import Path
from tinsmith.observe import series
from tinsmith.observe.metrics import Counting
counting = Counting(series.TABLE, "worker-0", Path(sys.argv[1]))
counting.start()
series.OPS.add("sample", "done", by=3)
series.TENANT_TOKENS.add("alice", "sampled", by=5)
series.KV_USED.set(7, "0")
counting.flush()
series.OPS.add("sample", "done")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    yield tmp_path
    for meter in series.TABLE:
        if isinstance(meter, Meter):
            meter.stop()


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_nothing_is_counted_before_the_start() -> None:
    counter, gauge, histogram = Counter("a_total", "a"), Gauge("b", "b"), Histogram("c", "c", buckets=(1.0,))
    counter.add()
    gauge.set(1)
    histogram.observe(1)
    counting = Counting([counter, gauge, histogram], "api", None)
    counting.start()
    assert samples(counting.text())[("a_total", ())] == 0
    counting.stop()
    counter.add()


def test_counters_gauges_and_histograms_as_prometheus_reads_them(shared: Path) -> None:
    counter, gauge = Counter("a_total", "a", "kind"), Gauge("b", "b")
    histogram = Histogram("c_seconds", "c", buckets=(1.0, 2.0))
    counting = Counting([counter, gauge, histogram], "api", shared)
    counting.start()
    threads = [threading.Thread(target=lambda: [counter.add("x") for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gauge.set(4)
    for value in (1.0, 1.5, 9.0):
        histogram.observe(value)
    found = samples(counting.text())
    counting.stop()
    assert found[("a_total", ("x",))] == 4000
    assert found[("b", ())] == 4
    buckets = [found[("c_seconds_bucket", (le,))] for le in ("1.0", "2.0", "+Inf")]
    assert (buckets, found[("c_seconds_count", ())], found[("c_seconds_sum", ())]) == ([1, 2, 3], 3, 11.5)


def test_a_place_goes_on_after_kill_9_with_the_same_files(shared: Path) -> None:
    numbers = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", KILLED, str(shared)], env=dict(os.environ), check=False)
        assert done.returncode == -signal.SIGKILL
        numbers.append(len(list(shared.iterdir())))
    assert len(set(numbers)) == 1
    counting = Counting(series.TABLE, "worker-0", shared)
    counting.start()
    found = samples(counting.text())
    assert found[("tinsmith_ops_total", ("sample", "done"))] == 9  # what was not flushed is lost, and nothing else
    assert ("tinsmith_kv_used_bytes", ("0",)) not in found  # the level of a process that is gone
    assert series.TENANT_TOKENS.kept("tenant") == {"alice"}


def test_the_first_of_what_is_alerted_about_is_an_increase(shared: Path) -> None:
    name = "tinsmith_failed_ops_total"
    counting = Counting(series.TABLE, "worker-0", shared)
    counting.start()
    assert samples(counting.text())[name, ("internal",)] == 0
    series.FAILED_OPS.add("internal")
    assert samples(counting.text())[name, ("internal",)] == 1


def test_a_successor_that_comes_early_counts_beside(shared: Path) -> None:
    before = Counting(series.TABLE, "api", shared)
    before.start()
    series.OPS.add("sample", "done", by=2)
    before.flush()
    after = Counting(series.TABLE, "api", shared)
    after.start()
    series.OPS.add("sample", "done", by=3)
    assert samples(after.text())[("tinsmith_ops_total", ("sample", "done"))] == 5
    assert len(list(shared.glob("counter_*.db"))) == 2
    after.stop()
    third = Counting(series.TABLE, "api", shared)
    third.start()
    assert len(list(shared.glob("counter_*.db"))) == 2
    third.stop()
    before.stop()


def test_the_first_tenants_have_labels_and_keep_them() -> None:
    asked: list[str] = []

    def name_of(tenant_id: str) -> str:
        asked.append(tenant_id)
        return tenant_id.upper()

    labels = TenantLabels(2, name_of, kept={"B", "other"})
    assert [labels[tenant] for tenant in ("a", "c", "b", "a", "d")] == ["A", "other", "B", "A", "other"]
    assert asked == ["a", "c", "b", "d"]


def test_who_waits_most_is_named_and_the_rest_is_one() -> None:
    waiting = [
        Waiting("alice", "sample", 5, 90.0),
        Waiting("alice", "forward", 1, 80.0),
        Waiting("bob", "sample", 4, 95.0),
        Waiting("carol", "sample", 2, 40.0),
        Waiting("dave", "sample", 1, 70.0),
    ]
    depth, oldest = by_tenant(waiting, 2, 100.0)
    assert depth == {"alice": 6, "bob": 4, "other": 3}
    assert oldest == {"alice": 20.0, "bob": 5.0, "other": 60.0}


def test_names_follow_the_conventions() -> None:
    names = [one.name for one in series.TABLE]
    assert len(set(names)) == len(names)
    for one in series.TABLE:
        assert one.name.startswith("tinsmith_")
        assert one.name.endswith("_total") == (one.kind == "counter")
        assert one.help.endswith(".")
        assert bool(one.buckets) == isinstance(one, Histogram)
        assert list(one.buckets) == sorted(one.buckets)
