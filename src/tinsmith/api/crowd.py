"""Who has the connections, and who makes room when they become scarce.

A connection is a stranger's until it shows a good key, and that tenant's from then on. While tenants have fewer than
seven eighths of what the process can hold, each may have as many as he likes. The last eighth is for those who have
few; strangers may use it, and count for nothing in any tenant's share. What stays true:

* A stranger's connection makes room for any other, whoever has been there longest first: one that is idle, has not
  said what it wants, or doesn't take its answer. Only while it is being answered it stays.
* Whoever has fewer than the one who has most is let in, and that one makes room: a connection that is idle is closed,
  a poll is answered at once and its connection closed after that. Nothing else that is under way is cut.
* Whoever has most himself is turned away, so nobody's own connections make room for his next one. Where nothing can
  make room, he is let in who has no more than are free (as buffers of a switch are shared: Choudhury and Hahne,
  "Dynamic Queue Length Thresholds", 1998), so some always are.
* Whoever was turned away is a stranger until he is gone.

For the event loop's own thread. A connection that has shown its key costs nothing here, however many requests it bears.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from tinsmith.types import TenantId

SPARE = 8  # one part of so many
LOOKED = 64  # connections of one tenant in one look for who can make room; the next look goes on from there


class Guest(Protocol):
    """A connection."""

    def may_leave(self) -> bool:
        """Whether it is idle, or waits for what can be asked for again; or is a stranger's that takes no answer."""
        ...

    def leave(self) -> None:
        """Make room, soon."""
        ...


class Crowd:
    """Of at most `most` connections."""

    def __init__(self, most: int) -> None:
        self._most, self._spare = most, max(1, most // SPARE)
        self._strangers: OrderedDict[Guest, None] = OrderedDict()
        self._parties: dict[TenantId, OrderedDict[Guest, None]] = {}
        self._tenants: dict[Guest, TenantId] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._tenants)

    def come(self, guest: Guest) -> bool:
        """A connection is opened. False: there is no room for it."""
        is_in = len(self) < self._most or self._dismiss_one(self._strangers)
        self._strangers[guest] = None
        return is_in

    def settle(self, guest: Guest, tenant_id: TenantId) -> bool:
        """It is this tenant's from now on. False: the tenant has as many as it may now."""
        self.gone(guest)
        self._tenants[guest] = tenant_id
        party = self._parties.setdefault(tenant_id, OrderedDict())
        party[guest] = None
        if len(self._tenants) <= self._most - self._spare or self._makes_room_for(party):
            return True
        self.gone(guest)
        self._strangers[guest] = None
        return False

    def _makes_room_for(self, party: OrderedDict[Guest, None]) -> bool:
        largest = max(self._parties.values(), key=len)
        if len(largest) > len(party) and self._dismiss_one(largest):
            return True
        return len(party) <= max(1, self._most - len(self._tenants))

    def gone(self, guest: Guest) -> None:
        """The connection is lost, or counts no more."""
        self._strangers.pop(guest, None)
        tenant_id = self._tenants.pop(guest, None)
        if tenant_id is not None:
            party = self._parties[tenant_id]
            del party[guest]
            if not party:
                del self._parties[tenant_id]

    def _dismiss_one(self, party: OrderedDict[Guest, None]) -> bool:
        """The one that has been there longest, of those that may leave."""
        for _ in range(min(LOOKED, len(party))):
            guest = next(iter(party))
            if guest.may_leave():
                self.gone(guest)
                guest.leave()
                return True
            party.move_to_end(guest)
        return False
