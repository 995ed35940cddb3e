"""How many unknown keys an address may send, so that trying keys out costs the server little.

A bucket for each address: an unknown key fills it by one, and it empties at a steady rate. For the event loop's own
thread.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_ADDRESSES = 10_000  # remembered, those that were heard of last
IPV6_PREFIX = 64  # what one customer has


class Guesses:
    """per_minute: how many an address may send at once, and how many more with every minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how full, and when

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, address: str) -> int:
        """Whole seconds until this address may send another one; 0: it may now."""
        over = self._level(address) + 1 - self._most
        return math.ceil(over * 60 / self._most) if over > 0 else 0

    def count(self, address: str) -> None:
        """A key came from there that may be an unknown one."""
        self._set(address, self._level(address) + 1)

    def forgive(self, address: str) -> None:
        """The key that was counted is a good one."""
        self._set(address, max(0.0, self._level(address) - 1))

    def _level(self, address: str) -> float:
        level, at = self._buckets.get(address, (0.0, 0.0))
        return max(0.0, level - (self._clock() - at) * self._most / 60)

    def _set(self, address: str, level: float) -> None:
        self._buckets.pop(address, None)
        if level > 0:
            self._buckets[address] = (level, self._clock())
            if len(self._buckets) > MAX_ADDRESSES:
                self._buckets.popitem(last=False)


def address_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the network of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
