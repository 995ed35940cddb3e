"""How much memory this process can still take, and giving back what it freed.

Memory is bounded by the machine, by control groups (containers) and by the process's own limits; the narrowest counts.
What the C library keeps of freed memory can be used again, so it counts as free. Linux tells; elsewhere nothing is
known.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60  # control groups without a limit state one beyond this, or none
ROOT = Path("/")

_libc = ctypes.CDLL(None)


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip

    uordblks: int
    fordblks: int
    hblkhd: int


def available_bytes(root: Path = ROOT) -> int | None:
    """What can be allocated and touched before the machine, a container's limit or this process's own is reached.

    Args:
        root: where /proc and /sys are.

    Returns:
        None if this system doesn't tell.
    """
    free = _machine_free(root)
    if free is None:
        return None
    kept, kept_resident = _kept_by_malloc(root)
    rooms = [free + kept_resident, *(room + kept_resident for room in _group_rooms(root))]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        rooms.append(limit - _status_bytes(root, "VmSize") + kept)
    return max(0, min(rooms))


def num_oom_kills(root: Path = ROOT) -> int | None:
    """Processes that the system has killed for want of memory since its start; None if this system doesn't tell."""
    try:
        counts = dict(line.split() for line in (root / "proc/vmstat").read_text().splitlines())
        return int(counts["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None


def give_back() -> None:
    """Return freed memory to the system, where the C library can. Costs some milliseconds."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _machine_free(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _status_bytes(root: Path, name: str) -> int:
    for line in _lines(root / "proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _kept_by_malloc(root: Path) -> tuple[int, int]:
    """Freed memory that the C library keeps, and how much of it is still backed by the machine's memory at most."""
    if not hasattr(_libc, "mallinfo2"):
        return 0, 0
    mallinfo2 = _libc.mallinfo2
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    resident = _status_bytes(root, "RssAnon") - info.uordblks - info.hblkhd
    return info.fordblks, max(0, min(info.fordblks, resident))


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group that this process is in has left, with the caches that it would give up."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _rooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _rooms(root / "sys/fs/cgroup/memory", path, *names)


def _rooms(mount: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    """Of the group `path` and those around it. Inside a container the path may be unknown: its own is at the mount."""
    inner = PurePosixPath(path.lstrip("/"))
    for group in (mount / inner, *(mount / parent for parent in inner.parents)):
        limit, usage = _number(group / limit_name), _number(group / usage_name)
        if limit is not None and usage is not None and limit < UNLIMITED:
            yield limit - usage + _cache_bytes(group, cache_name)


def _cache_bytes(group: Path, name: str) -> int:
    for line in _lines(group / "memory.stat"):
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
