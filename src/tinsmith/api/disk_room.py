"""Whether there is room on the disk for more: new requests are refused before the disk is full, and those of a tenant
before it has filled the disk of all.

What was accepted stays and is carried out; that needs some room too, which is why the bound comes early. Free space is
looked at before each request, at most every `LOOK_S`; what the directory takes is measured by the janitor's rounds, and
what this process wrote since then counts on top.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from tinsmith.config import Settings
from tinsmith.errors import StorageFullError
from tinsmith.files.blobs import Blobs
from tinsmith.store import Store
from tinsmith.store.files import ROW_BYTES
from tinsmith.types import TenantId
from tinsmith.upkeep.disk_use import DiskUse, free_bytes, measure, size

LOOK_S = 1.0
MEASURE_PAUSE = 50  # between two measurements, times what one takes
MIB = 2**20
TENANT_SHARE = 0.9  # of what all may take, where nothing else is set


class DiskRoom:
    """May be called from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._data_dir: Path = settings.data_dir
        self._max_bytes = settings.max_disk_mib * MIB
        self._max_tenant_bytes = settings.max_tenant_disk_mib * MIB
        self._min_free_bytes = settings.min_free_disk_mib * MIB
        self._free_bytes = 0
        self._looked_at = float("-inf")
        self._lock = threading.Lock()
        self._written: Counter[TenantId] = Counter()  # since it was measured
        self._next_measure = float("-inf")
        self.use: DiskUse | None = None  # as it was measured last

    def measure(self, store: Store, blobs: Blobs) -> None:
        """Look at what the directory takes now; left out where looking would take more than a fiftieth of the time."""
        started = time.monotonic()
        if started < self._next_measure:
            return
        with self._lock:
            written = Counter(self._written)
        use = measure(self._data_dir, store, blobs)
        with self._lock:
            self.use = use
            self._written -= written
        self._next_measure = started + MEASURE_PAUSE * (time.monotonic() - started)

    def take(self, tenant_id: TenantId, num_bytes: int) -> None:
        """So much is about to be written for a new request of the tenant's, and a row.

        Raises:
            StorageFullError: there is no room for it.
        """
        num_bytes += ROW_BYTES
        with self._lock:
            if self._min_free_bytes:
                self._require_free(num_bytes)
            taken = 0 if self.use is None else self.use.total_bytes + self._written.total()
            if self._max_bytes and taken + num_bytes > self._max_bytes:
                raise StorageFullError(
                    f"the data directory takes {size(taken)}, of {size(self._max_bytes)} at most (--max-disk-mib): "
                    "delete checkpoints or let them expire, or allow more; what was accepted is carried out"
                )
            self._require_share(tenant_id, num_bytes)
            self._written[tenant_id] += num_bytes

    def _require_share(self, tenant_id: TenantId, num_bytes: int) -> None:
        if self.use is None:
            return
        most = self._max_tenant_bytes or int(TENANT_SHARE * self._room_bytes(self.use))
        taken = self.use.bytes_by_tenant.get(tenant_id, 0) + self._written[tenant_id]
        if taken + num_bytes > most:
            raise StorageFullError(
                f"your files take {size(taken)}, of {size(most)} that one tenant's may (--max-tenant-disk-mib): delete "
                "checkpoints or let them expire, or have the administrator allow more; what was accepted is carried out"
            )

    def _room_bytes(self, use: DiskUse) -> int:
        """What all tenants together may take."""
        return self._max_bytes or max(0, use.total_bytes + use.free_bytes - self._min_free_bytes)

    def _require_free(self, num_bytes: int) -> None:
        if time.monotonic() - self._looked_at > LOOK_S:
            self._free_bytes = free_bytes(self._data_dir)
            self._looked_at = time.monotonic()
        if self._free_bytes - num_bytes < self._min_free_bytes:
            raise StorageFullError(
                f"the server's disk has {size(self._free_bytes)} free, and {size(self._min_free_bytes)} are kept free "
                "(--min-free-disk-mib): delete checkpoints or free space on it; what was accepted is carried out"
            )
        self._free_bytes -= num_bytes
