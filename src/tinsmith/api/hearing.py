"""Whether a connection is read on whose client was told to come again later.

A client that waits as it was told is always read. One that comes before its time isn't read for the rest of it: what it
sends meanwhile waits on its own side, where it costs the server nothing. If more has come when it is read again, it is
left unread from its next refusal on, for as long as that tells it to wait, until nothing has come in such a time.

On a connection that brings anything else than requests to be refused (polls, heartbeats, another tenant's requests
through a proxy) whatever waits would wait with them: it is unread for `DEAF_S` at most.
"""

from __future__ import annotations

from tinsmith.api.stay import Stay
from tinsmith.types import TenantId

PATIENCE = 0.9  # of what a client was told to wait: it is on time then
DEAF_S = 1.0


class Hearing:
    """Of one connection. `now` is the event loop's time."""

    __slots__ = ("_is_impatient", "_tenant_id", "_until", "is_unread")

    def __init__(self) -> None:
        self._until = 0.0
        self._is_impatient = self.is_unread = False
        self._tenant_id: TenantId | None = None

    def left_s(self, now: float) -> float:
        """Of the time that its client was told to wait."""
        return max(0.0, self._until - now) if self._until else 0.0

    def refused(self, tenant_id: TenantId, stay: Stay, wait_s: int, now: float) -> float:
        """A request of this tenant's is told to wait. stay: of what was served on the connection. Comes to the seconds
        for which nothing is read then."""
        left_s = self.left_s(now)
        if not left_s:
            self._until = now + PATIENCE * wait_s
        stay.is_mixed |= not {self._tenant_id, stay.tenant_id} <= {None, tenant_id}
        self._tenant_id = tenant_id
        if stay.is_mixed:
            unread_s = DEAF_S if left_s else 0.0
        elif self._is_impatient:
            unread_s = PATIENCE * wait_s
        else:
            unread_s = max(DEAF_S, left_s) if left_s else 0.0
        self.is_unread = unread_s > 0
        return unread_s

    def again(self, *, has_more: bool) -> None:
        """It is read again. has_more: something has come meanwhile."""
        self.is_unread, self._is_impatient = False, has_more
