"""Places: how much of one thing each tenant may use at one time, so that what one does in plenty is for it to wait for.

For the event loop's own thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from weakref import WeakValueDictionary

from tinsmith.types import TenantId

CALLER: ContextVar[TenantId | None] = ContextVar("caller", default=None)  # whose call this is, once its key was read


class Places:
    """of_tenant: how many places each tenant has; those who find none free wait in the order in which they came.

    in_all: how many there are for all tenants together; None: as many as their shares.
    """

    def __init__(self, of_tenant: int, in_all: int | None = None) -> None:
        self._of_tenant, self._in_all = of_tenant, in_all
        self.num_taken = 0
        self._shares: WeakValueDictionary[TenantId, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def place(self, tenant_id: TenantId) -> AsyncIterator[None]:
        """Wait for one of the tenant's places, and hold it."""
        async with self._share(tenant_id):
            yield

    async def try_take(self, tenant_id: TenantId, within_s: float) -> asyncio.Semaphore | None:
        """A place, to be handed to `give_back`; None: none of the tenant's was free in time, or none of all."""
        share = self._share(tenant_id)
        if share.locked():
            try:
                async with asyncio.timeout(within_s):
                    await share.acquire()
            except TimeoutError:
                return None
        else:
            await share.acquire()
        if self._in_all is not None and self.num_taken >= self._in_all:
            share.release()
            return None
        self.num_taken += 1
        return share

    def give_back(self, share: asyncio.Semaphore) -> None:
        share.release()
        self.num_taken -= 1

    def _share(self, tenant_id: TenantId) -> asyncio.Semaphore:
        share = self._shares.get(tenant_id)
        if share is None:
            share = self._shares[tenant_id] = asyncio.Semaphore(self._of_tenant)
        return share
