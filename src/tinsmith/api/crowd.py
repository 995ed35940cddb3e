"""Who has the connections, and who makes room when they become scarce.

A connection is a stranger's until it shows a good key, and that tenant's from then on. While tenants have fewer than
seven eighths of what the process can hold, each may have as many as he likes. The last eighth is for those who have
few; strangers may use it, and count for nothing in any tenant's share. What stays true:

* A stranger's connection makes room for any other, whoever has been there longest first: one whose handshake isn't
  through, that is idle, has not said what it wants, or doesn't take its answer. Only while it is being answered it
  stays.
* Whoever has fewer than the one who has most is let in, and that one makes room: a connection that is idle is closed,
  a poll is answered at once and its connection closed after that. Nothing else that is under way is cut; where that is
  all that he has, the next largest is asked.
* Whoever has most himself is turned away with his next poll, so that polls never drive out one another without end;
  for what else he asks, one of his own that is idle or polls makes room. Where nothing can make room, he is let in who
  has no more than are free (as buffers of a switch are shared: Choudhury and Hahne, "Dynamic Queue Length Thresholds",
  1998).
* Tenants never have all places, as everybody who comes is a stranger until his key is seen.
* Whoever was turned away is a stranger until he is gone.

For the event loop's own thread. A connection that has shown its key costs nothing here, however many requests it bears.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import nlargest
from typing import Protocol

from tinsmith.types import TenantId

SPARE = 8  # one part of so many
DOOR = 4  # of that part, one part of so many is strangers' alone
ASKED = 4  # of the largest tenants, for room
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
        self._most_settled = max(1, most - max(1, self._spare // DOOR))
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

    def settle(self, guest: Guest, tenant_id: TenantId, *, is_poll: bool) -> bool:
        """It is this tenant's from now on. is_poll: it brings one. False: the tenant has as many as it may now."""
        self.gone(guest)
        self._tenants[guest] = tenant_id
        party = self._parties.setdefault(tenant_id, OrderedDict())
        party[guest] = None
        if len(self._tenants) <= self._most - self._spare or self._dismiss_of_largest(len(party)):
            return True
        if len(self._tenants) <= self._most_settled and len(party) <= max(1, self._most - len(self._tenants)):
            return True
        if not is_poll and self._dismiss_one(party, but_last=True):
            return True
        self.gone(guest)
        self._strangers[guest] = None
        return False

    def _dismiss_of_largest(self, num: int) -> bool:
        """One of a tenant that has more than `num`."""
        largest = nlargest(ASKED, self._parties.values(), key=len)
        return any(len(party) > num and self._dismiss_one(party) for party in largest)

    def gone(self, guest: Guest) -> None:
        """The connection is lost, or counts no more."""
        self._strangers.pop(guest, None)
        tenant_id = self._tenants.pop(guest, None)
        if tenant_id is not None:
            party = self._parties[tenant_id]
            del party[guest]
            if not party:
                del self._parties[tenant_id]

    def _dismiss_one(self, party: OrderedDict[Guest, None], *, but_last: bool = False) -> bool:
        """The one that has been there longest, of those that may leave. but_last: the one that came last stays."""
        for _ in range(min(LOOKED, len(party) - but_last)):
            guest = next(iter(party))
            if guest.may_leave():
                self.gone(guest)
                guest.leave()
                return True
            party.move_to_end(guest)
        return False
