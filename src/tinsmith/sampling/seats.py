"""Whose sequences are decoded together: the seats are shared between tenants, and a tenant's between its snapshots.

A tenant takes another seat only while it holds less than `RATIO` times the free ones (dynamic thresholds: Choudhury and
Hahne 1998). So a tenant alone leaves an eighth free, and one that comes finds a seat at once; where many want them,
each ends up with the same number as seats fall free. Pure counting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tinsmith.sampling.sequence import Request, Sequence

RATIO = 7


def fair_share(total: int) -> int:
    """The most that a tenant holds of something while it is alone; at least one."""
    return max(1, total * RATIO // (RATIO + 1))


class Seats:
    """One moment's count. `total`: sequences that are decoded together at most."""

    def __init__(self, total: int, seated: Iterable[Sequence]) -> None:
        self._by_tenant: Counter[str] = Counter()
        self._by_line: Counter[tuple[str, str | None]] = Counter()
        self._free = total
        for sequence in seated:
            self.take(sequence.request)

    def take(self, request: Request) -> None:
        self._by_tenant[request.tenant] += 1
        self._by_line[request.line] += 1
        self._free -= 1

    def room(self, tenant: str) -> int:
        """How many more the tenant may take now."""
        held = self._by_tenant[tenant]
        if self._free <= 0:
            return 0
        return max((RATIO * self._free - held) // (RATIO + 1), 0 if held else 1)

    def next_of(self, ready: Iterable[Request]) -> Request | None:
        """The one whose tenant, then whose snapshot holds least, the oldest of those; of those that may take a seat."""
        may = [request for request in ready if request.num_unstarted and self.room(request.tenant) > 0]
        return min(may, key=lambda r: (self._by_tenant[r.tenant], self._by_line[r.line]), default=None)
