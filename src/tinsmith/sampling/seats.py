"""Whose sequences are decoded together: the seats are shared between tenants, and a tenant's between its snapshots.

A tenant takes another seat only while it holds less than `RATIO` times the free ones (dynamic thresholds: Choudhury and
Hahne 1998), times its weight, where the greatest weight of those who are there counts as 1. So a tenant alone leaves an
eighth free, and one that comes finds a seat at once; where many want them, each ends up with as many as its weight
says, as seats fall free. Pure counting.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from tinsmith.sampling.sequence import Request, Sequence

RATIO = 7
AHEAD = 4  # requests of a tenant, each of another snapshot, whose prompts are computed while no seat is free


def fair_share(total: int) -> int:
    """The most that a tenant holds of something while it is alone; at least one."""
    return max(1, total * RATIO // (RATIO + 1))


class Seats:
    """One moment's count. `total`: sequences that are decoded together at most."""

    def __init__(self, total: int, seated: Iterable[Sequence]) -> None:
        self._by_tenant: Counter[str] = Counter()
        self._by_line: Counter[tuple[str, str | None]] = Counter()
        self._weights: dict[str, float] = {}
        self._free = total
        self._refused: set[Request] = set()
        for sequence in seated:
            self.note(sequence.request)
            self.take(sequence.request)

    def note(self, request: Request) -> None:
        """It is among those who want seats, with its tenant's weight."""
        self._weights[request.tenant] = request.item.weight

    def take(self, request: Request) -> None:
        self._by_tenant[request.tenant] += 1
        self._by_line[request.line] += 1
        self._free -= 1

    def room(self, tenant: str) -> int:
        """How many more the tenant may take now."""
        held = self._by_tenant[tenant]
        if self._free <= 0:
            return 0
        ratio = RATIO * self._weights.get(tenant, 1.0) / max(self._weights.values(), default=1.0)
        return max(int((ratio * self._free - held) // (ratio + 1)), 0 if held else 1)

    def _held(self, request: Request) -> tuple[float, int]:
        by_weight = self._by_tenant[request.tenant] / self._weights.get(request.tenant, 1.0)
        return by_weight, self._by_line[request.line]

    def in_turn(self, ready: Iterable[Request]) -> Iterator[Request]:
        """Who may begin a sequence next, until nobody may: of those whose tenant, by weight, then whose snapshot holds
        least, the first. Between two of them the caller says `take`, or `refuse` if there was another obstacle."""
        lines: dict[tuple[str, str | None], deque[tuple[int, Request]]] = {}
        for order, request in enumerate(ready):
            if request.num_unstarted:
                self.note(request)
                lines.setdefault(request.line, deque()).append((order, request))
        heap = [(0.0, 0, line[0][0], line) for line in lines.values()]
        while heap:
            by_tenant, by_line, order, line = heap[0]
            request = line[0][1]
            held = self._held(request)
            if self.room(request.tenant) <= 0:
                heapq.heappop(heap)
            elif held != (by_tenant, by_line):  # what is held never shrinks here, so others are before it at most
                heapq.heapreplace(heap, (*held, order, line))
            else:
                yield request
                if request in self._refused or not request.num_unstarted:
                    line.popleft()
                    if line:
                        heapq.heapreplace(heap, (*held, line[0][0], line))
                    else:
                        heapq.heappop(heap)

    def refuse(self, request: Request) -> None:
        """It begins no more sequences for now."""
        self._refused.add(request)


class Coming:
    """Requests on their way to a seat: no more prompts are computed than can be seated, but for the next of a line, of
    whom a tenant has a few ready for the seats that fall free."""

    def __init__(self, seats: Seats, requests: Iterable[Request]) -> None:
        self._seats = seats
        self._unstarted: Counter[str] = Counter()
        self._num_requests: Counter[str] = Counter()
        self._lines: set[tuple[str, str | None]] = set()
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        self._seats.note(request)
        self._unstarted[request.tenant] += request.num_unstarted
        self._num_requests[request.tenant] += 1
        self._lines.add(request.line)

    def may_come(self, request: Request) -> bool:
        self._seats.note(request)
        room = self._seats.room(request.tenant)
        if room > self._unstarted[request.tenant]:
            return True
        return request.line not in self._lines and (room > 0 or self._num_requests[request.tenant] < AHEAD)
