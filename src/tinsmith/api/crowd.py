"""Who has the connections, and who makes room when they become scarce.

A connection is a stranger's until it shows a good key, and that tenant's from then on. While fewer than seven eighths
of what the process can hold are open, everybody may have as many as he likes. The last eighth is for those who have
few. What stays true:

* A stranger's connection that is idle, or has not said what it wants within `YOUNG_S`, makes room for any other.
* Whoever has fewer than the one who has most is let in, and that one makes room: a connection that is idle is closed,
  a poll is answered at once and its connection closed after that. Nothing else that is under way is cut.
* Whoever has most himself is turned away, so nobody's own connections make room for his next one. Where nothing can
  make room, each tenant has its part of the last eighth.

For the event loop's own thread. A connection that has shown its key costs nothing here, however many requests it bears.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from tinsmith.types import TenantId

SPARE = 8  # one part of so many
YOUNG_S = 1.0
LOOKED = 64  # connections of one tenant in one look for who can make room; the next look goes on from there


class Guest(Protocol):
    """A connection."""

    def may_leave(self) -> bool:
        """Whether it is idle, or waits for what can be asked for again."""
        ...

    def leave(self) -> None:
        """Make room, soon."""
        ...


class Crowd:
    """Of at most `most` connections."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._spare = most, max(1, most // SPARE)
        self._clock = clock
        self._strangers: OrderedDict[Guest, float] = OrderedDict()  # since when
        self._parties: dict[TenantId, OrderedDict[Guest, None]] = {}
        self._tenants: dict[Guest, TenantId] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._tenants)

    def come(self, guest: Guest) -> bool:
        """A connection is opened. False: there is no room for it."""
        self._strangers[guest] = self._clock()
        return len(self) <= self._most or self._dismiss_stranger()

    def settle(self, guest: Guest, tenant_id: TenantId) -> bool:
        """It is this tenant's from now on. False: the tenant has as many as it may now."""
        self.gone(guest)
        self._tenants[guest] = tenant_id
        party = self._parties.setdefault(tenant_id, OrderedDict())
        party[guest] = None
        if len(self) <= self._most - self._spare or self._dismiss_stranger():
            return True
        largest = max(self._parties.values(), key=len)
        if len(largest) > len(party) and self._dismiss_one(largest):
            return True
        return len(party) <= max(1, self._spare // len(self._parties))

    def gone(self, guest: Guest) -> None:
        """The connection is lost, or counts no more."""
        self._strangers.pop(guest, None)
        tenant_id = self._tenants.pop(guest, None)
        if tenant_id is not None:
            party = self._parties[tenant_id]
            del party[guest]
            if not party:
                del self._parties[tenant_id]

    def _dismiss_stranger(self) -> bool:
        """The one that has been there longest, of those that are no more than idle."""
        now = self._clock()
        for _ in range(min(LOOKED, len(self._strangers))):
            guest, since = next(iter(self._strangers.items()))
            if since > now - YOUNG_S:
                return False
            if guest.may_leave():
                self._dismiss(guest)
                return True
            self._strangers.move_to_end(guest)
            self._strangers[guest] = now
        return False

    def _dismiss_one(self, party: OrderedDict[Guest, None]) -> bool:
        for _ in range(min(LOOKED, len(party))):
            guest = next(iter(party))
            if guest.may_leave():
                self._dismiss(guest)
                return True
            party.move_to_end(guest)
        return False

    def _dismiss(self, guest: Guest) -> None:
        self.gone(guest)
        guest.leave()
