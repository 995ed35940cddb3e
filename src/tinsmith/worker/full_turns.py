"""Which snapshots of full runs are sampled from now, where there are places for few. Pure but for what it remembers.

A snapshot that is open serves whoever asks for it, until others have waited for a place: then it takes no further
requests, ends those under way, and goes. Tenants take turns at the places; of a tenant's snapshots the one that has
waited longest comes first. So nobody holds a place for ever: beside those before it in turn, a snapshot waits for
`TURN_S` and for the requests that are under way then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinsmith.types import TenantId

TURN_S = 5.0  # that a snapshot has its place at least, and that others wait before they take it


class FullTurns:
    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # of those that wait
        self._opened: dict[str, float] = {}
        self._closed: set[str] = set()
        self._tenants: dict[str, TenantId] = {}
        self._served: dict[TenantId, int] = {}
        self._number = 0

    def choose(
        self, wanted: Sequence[tuple[TenantId, str]], held: Mapping[str, bool], num_places: int, now: float
    ) -> frozenset[str]:
        """The snapshots whose requests may be taken.

        Args:
            wanted: of the requests that wait: whose, and which snapshot.
            held: those that are open, and whether requests are under way.
            num_places: how many more can be opened, if all go that aren't used.
            now: on any clock, in seconds.
        """
        if not wanted and not held:
            self._forget()
            return frozenset()
        asked = {key: tenant for tenant, key in wanted}
        self._note(asked, held, now)
        chosen = {key for key in asked if key in held and key not in self._closed}
        free = num_places - sum(not held[key] for key in chosen)
        waiting = [key for key in asked if key not in chosen and not held.get(key)]
        waiting.sort(key=lambda key: (self._served.get(asked[key], 0), self._since[key]))
        coming, left = waiting[: max(0, free)], waiting[max(0, free) :]
        self._closed.difference_update(coming)
        in_use = {key for key, is_busy in held.items() if is_busy or key in chosen}
        self._close(sum(now - self._since[key] >= TURN_S for key in left), in_use, now)
        return frozenset(chosen - self._closed) | frozenset(coming)

    def _forget(self) -> None:
        """Nobody waits and nothing is open."""
        self._since, self._opened, self._tenants, self._served = {}, {}, {}, {}
        self._closed.clear()

    def _note(self, asked: Mapping[str, TenantId], held: Mapping[str, bool], now: float) -> None:
        """Who has come in, who has gone, and who waits since when."""
        for key in held.keys() - self._opened.keys():
            tenant = self._tenants.get(key)
            if tenant is not None:
                self._number += 1
                self._served[tenant] = self._number
        self._opened = {key: self._opened.get(key, now) for key in held}
        self._closed &= held.keys()
        self._tenants = {key: tenant for key, tenant in self._tenants.items() if key in asked or key in held}
        self._tenants |= asked
        known = set(self._tenants.values())
        self._served = {tenant: number for tenant, number in self._served.items() if tenant in known}
        self._since = {key: self._since.get(key, now) for key in asked if key not in held or key in self._closed}
        if self._since.keys() <= self._closed:
            self._closed.clear()

    def _close(self, num_due: int, in_use: set[str], now: float) -> None:
        """Those that have been open longest go first."""
        may = [k for k in in_use if k not in self._closed and now - self._opened[k] >= TURN_S]
        for key in sorted(may, key=self._opened.__getitem__)[: max(0, num_due - len(self._closed))]:
            self._closed.add(key)
