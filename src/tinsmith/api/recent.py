"""Requests that this process took in a moment ago, or was asked for until a moment ago, and what they have come to.

Nearly every request is asked for within moments of its arrival and of its end, by the process that took it in. That
poll needs no look at the database: that the request is there was seen when it was recorded, and its final row when the
watcher looked. A poll that was told to ask again does so at once, and needs none either. What stays true: only rows
that were read from the store or written to it are told, each to its own tenant; a final one is told once, soon, and
then forgotten. Everything else is the store's to answer.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, TenantId

MAX_OPEN = 256
MAX_ENDED = 256
MAX_LEFT = 12_000  # one for each connection
TTL_S = 1.0
LEFT_S = 5.0  # in which thousands who were told at once have asked again


class Recent:
    """For the event loop's own thread."""

    def __init__(self) -> None:
        self._open: OrderedDict[OpId, tuple[OpRow, float]] = OrderedDict()
        self._left: OrderedDict[OpId, tuple[OpRow, float]] = OrderedDict()
        self._ended: OrderedDict[OpId, tuple[OpRow, float]] = OrderedDict()

    def opened(self, row: OpRow) -> None:
        """A request was recorded, and the watcher has begun no look since before that: the next one includes it."""
        self._open[row.id] = row, time.monotonic()
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)

    def left(self, row: OpRow) -> None:
        """A poll that waited for it is told to ask again; the watcher has looked for it until now."""
        self._left[row.id] = row, time.monotonic()
        self._left.move_to_end(row.id)
        if len(self._left) > MAX_LEFT:
            self._left.popitem(last=False)

    def open_ids(self) -> list[OpId]:
        """Those whose end is worth looking for before anybody asks."""
        since = time.monotonic() - LEFT_S
        while self._left and next(iter(self._left.values()))[1] < since:
            self._left.popitem(last=False)
        return [*self._open, *self._left]

    def ended(self, row: OpRow) -> None:
        """The watcher saw a final row."""
        if self._open.pop(row.id, None) is not None or self._left.pop(row.id, None) is not None:
            self._ended[row.id] = row, time.monotonic()
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)

    def find(self, tenant_id: TenantId, op_id: OpId) -> OpRow | None:
        """The request of this tenant: final, or as it was when it was recorded. None: look into the store."""
        left = self._left.get(op_id)
        row, at = self._ended.get(op_id) or self._open.get(op_id) or left or (None, 0.0)
        ttl_s = TTL_S if left is None else LEFT_S
        if row is None or row.tenant_id != tenant_id or time.monotonic() - at > ttl_s:
            return None
        self._ended.pop(op_id, None)
        return row

    def forget(self, op_id: OpId) -> None:
        """It is waited for now, or it never will be."""
        self._open.pop(op_id, None)
        self._left.pop(op_id, None)
