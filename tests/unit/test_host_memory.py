"""What this process can still take: the machine, the control groups of either version, and its own limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinsmith.machine import host_memory

MIB = 2**20
GIB = 2**30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free and no limits, in which the C library keeps nothing."""
    write(tmp_path, "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    write(tmp_path, "proc/self/status", "VmSize: 1024 kB\nRssAnon: 512 kB\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    monkeypatch.setattr(host_memory, "_kept_by_malloc", lambda root: (0, 0))
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_without_limits_the_machine_counts(root: Path) -> None:
    assert host_memory.available_bytes(root) == 8 * GIB


def test_a_container_of_version_2_and_those_around_it(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/pod/worker\n")
    for group, limit, used, cache in (("pod/worker", "max", 0, 0), ("pod", 4 * GIB, 3 * GIB, 512 * MIB)):
        write(root, f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        write(root, f"sys/fs/cgroup/{group}/memory.current", f"{used}\n")
        write(root, f"sys/fs/cgroup/{group}/memory.stat", f"anon 1\ninactive_file {cache}\n")
    assert host_memory.available_bytes(root) == GIB + 512 * MIB
    write(root, "sys/fs/cgroup/pod/worker/memory.max", f"{GIB}\n")
    assert host_memory.available_bytes(root) == GIB


def test_how_many_processes_the_system_killed_for_want_of_memory(root: Path) -> None:
    assert host_memory.num_oom_kills(root) is None
    write(root, "proc/vmstat", "pgfault 12345\noom_kill 3\n")
    assert host_memory.num_oom_kills(root) == 3


def test_a_container_of_version_1(root: Path) -> None:
    """Seen from inside, where the path of its group doesn't exist."""
    write(root, "proc/self/cgroup", "4:cpu,memory:/docker/abc\n1:cpu:/\n0::/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.stat", f"total_inactive_file {256 * MIB}\n")
    assert host_memory.available_bytes(root) == GIB + 256 * MIB
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert host_memory.available_bytes(root) == 8 * GIB


def test_another_system_tells_nothing(tmp_path: Path) -> None:
    assert host_memory.available_bytes(tmp_path) is None


def test_what_was_freed_and_kept_counts_as_free() -> None:
    """With the thresholds that `serve` sets: the process stays as large as it was, and may fill that again."""
    script = """
import numpy
from tinsmith.machine import host_memory
seen = []
blocks = [numpy.ones(2**20) for _ in range(40)]
for _ in range(2):
    seen += [host_memory._kept_by_malloc(host_memory.ROOT)[1], host_memory._status_bytes(host_memory.ROOT, "RssAnon")]
    blocks.clear()
host_memory.give_back()
print(*seen, host_memory._kept_by_malloc(host_memory.ROOT)[1])
"""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": str(128 * MIB), "MALLOC_TRIM_THRESHOLD_": str(GIB)}
    env = {**os.environ, **thresholds}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    kept_full, resident_full, kept_freed, resident_freed, kept_trimmed = (int(word) for word in run.stdout.split())
    assert resident_freed > 0.9 * resident_full > 300 * MIB, "the C library gave it all back: nothing to see here"
    assert kept_full < 40 * MIB
    assert 300 * MIB < kept_freed < 340 * MIB
    assert kept_trimmed < 40 * MIB


def test_a_limit_of_the_process_itself() -> None:
    script = """
import resource
from tinsmith.machine import host_memory
limit = host_memory._status_bytes(host_memory.ROOT, "VmSize") + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(host_memory.available_bytes())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 60 * MIB < int(run.stdout) < 70 * MIB
