"""What a data directory takes on its disk, by kind and by tenant, and how much room is left there.

Reads alone. Files are told apart by where they lie; a sampler's file lies among the checkpoints, whose rows say which
files are theirs.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinsmith.files.blobs import Blobs, tenant_of
from tinsmith.store import DATABASE_FILE, Store
from tinsmith.types import TenantId

KINDS = ("payloads", "results", "routes", "snapshots", "checkpoints", "samplers", "losses", "database", "log", "other")
LOG_SUFFIX = "-wal"
AREAS = ("payloads", "results", "routes", "snapshots", "checkpoints", "losses")


@dataclass(frozen=True, slots=True)
class DiskUse:
    """bytes_by_kind: all of `KINDS`. `log` is the database's write-ahead log; `other`: keys, locks, unfinished files.
    free_bytes: of the disk, for this user. bytes_by_tenant: files, rows (about), and the files that the saves which
    are queued will make. A file that its maker let go of counts for each tenant that keeps it.
    """

    bytes_by_kind: Mapping[str, int]
    free_bytes: int
    bytes_by_tenant: Mapping[TenantId, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())


def measure(data_dir: Path, store: Store, blobs: Blobs) -> DiskUse:
    """Look at every file. Takes some 10 us for each; a server does so every half minute."""
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    by_tenant = Counter(store.files.row_bytes())
    left_to_others = store.files.left_to_others()
    for file in blobs.files():
        for tenant_id in left_to_others.get(file.key, (tenant_of(file.key),)):
            by_tenant[tenant_id] += file.size
        area = file.key.split("/")[2] if file.key.count("/") >= 3 else ""
        found[area if area in AREAS and not file.is_unfinished else "other"] += file.size
    kept = min(store.files.checkpoint_bytes(), found["checkpoints"])
    found["samplers"] = found["checkpoints"] - kept
    found["checkpoints"] = kept
    for path in data_dir.iterdir():
        with suppress(FileNotFoundError):
            if path.is_file():
                kind = {DATABASE_FILE: "database", DATABASE_FILE + LOG_SUFFIX: "log"}.get(path.name, "other")
                found[kind] += path.stat().st_size
    return DiskUse(dict(found), free_bytes(data_dir), by_tenant)


def free_bytes(data_dir: Path) -> int:
    """Of the disk on which the directory lies, for this user."""
    return shutil.disk_usage(data_dir).free


def size(num_bytes: float) -> str:
    """ "1.50 GB", "2.3 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
