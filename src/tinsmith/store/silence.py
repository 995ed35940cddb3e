"""The times from which silence is reckoned (heartbeats, leases, a run's last request), and what setting the clock does.

What stays true: afterwards none lies further ahead than it can, and a clock put forward has made nobody older.
"""

from __future__ import annotations

from sqlalchemy import bindparam, case, update

from tinsmith.store.database import Database
from tinsmith.store.schema import runs, sessions, workers

_SHIFTED = sessions.c.last_beat_at + bindparam("ahead")
_SHIFT_BEATS = (
    update(sessions)
    .where(sessions.c.finished_at.is_(None))
    .values(last_beat_at=case((bindparam("now") < _SHIFTED, bindparam("now")), else_=_SHIFTED))
)
_CUT_REQUESTS = update(runs).where(runs.c.last_request_at > bindparam("now")).values(last_request_at=bindparam("now"))
_CUT_LEASES = update(workers).where(workers.c.lease_until > bindparam("most")).values(lease_until=bindparam("most"))


class Silence:
    def __init__(self, database: Database) -> None:
        self._database = database

    def clock_was_set(self, by_s: float, now: float, lease_s: float) -> None:
        """The wall clock was set, forward or back. Whoever was silent for a while then has been so for that long now.

        Leases that a clock put forward makes look over are renewed by their workers within a third of `lease_s`.

        Args:
            by_s: seconds; negative: back.
            now: unix seconds by the new time.
        """
        with self._database.write() as conn:
            conn.execute(_SHIFT_BEATS, {"ahead": max(0.0, by_s), "now": now})
            conn.execute(_CUT_REQUESTS, {"now": now})
            conn.execute(_CUT_LEASES, {"most": now + lease_s})
