"""Which connections speak with which key, so that those of a revoked one end with it.

A connection is known by the key that it last used; polls that wait on it, streams and downloads end with it. For the
event loop's own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from tinsmith.api.pressure import FILLING
from tinsmith.api.stay import STAY, Stay
from tinsmith.types import TenantId

POLLS = frozenset({"/api/v1/retrieve_future", "/api/v1/retrieve_futures"})


class Underway:
    def __init__(self) -> None:
        self._stays: dict[str, WeakSet[Stay]] = {}
        self._forgets: list[Callable[[str], None]] = []

    def on_change(self, forget: Callable[[str], None]) -> None:
        """Have `forget` called with the id of a key whose end has come or was moved."""
        self._forgets.append(forget)

    def key_ids(self) -> set[str]:
        """Keys that open connections use."""
        return set(self._stays)

    def begin(self, key_id: str, tenant_id: TenantId | None = None, path: str = "") -> None:
        """The connection that is being answered uses this key now. tenant_id: whose the key is, if it was shown. path:
        what is asked.

        Raises:
            CapacityError: connections are scarce, and the tenant has as many as it may.
        """
        stay = STAY.get()
        if stay is None:
            return
        if stay.key_id != key_id:
            if stay.key_id is not None:
                self._leave(stay.key_id, stay)
            stay.key_id = key_id
            self._stays.setdefault(key_id, WeakSet()).add(stay)
            stay.on_end = self._ended
        if path not in FILLING:
            stay.is_mixed = True
        if tenant_id is not None and stay.tenant_id != tenant_id:
            stay.is_mixed |= stay.tenant_id is not None
            stay.tenant_id = tenant_id
            stay.settle(tenant_id, path in POLLS)

    def changed(self, key_id: str) -> None:
        """The key's end was moved: it is looked up anew."""
        for forget in self._forgets:
            forget(key_id)

    def revoked(self, key_id: str) -> None:
        """The key works no more: every connection that uses it is closed, but for the one that is being answered."""
        self.changed(key_id)
        for stay in list(self._stays.get(key_id, ())):
            if stay is not STAY.get():
                stay.cut()

    def _ended(self, stay: Stay) -> None:
        if stay.key_id is not None:
            self._leave(stay.key_id, stay)

    def _leave(self, key_id: str, stay: Stay) -> None:
        stays = self._stays.get(key_id)
        if stays is not None:
            stays.discard(stay)
            if not stays:
                del self._stays[key_id]
