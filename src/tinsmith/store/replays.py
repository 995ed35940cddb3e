"""Replays under way: finished ops that a worker has begun to compute again, and not ended.

What is left of a worker that died is how often each was begun: one that ends every worker shows. Their outcomes are
nobody's business here, and the ops' own rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import bindparam, delete, insert, select, update

from tinsmith.store.database import Database
from tinsmith.store.fences import blame, require_current
from tinsmith.store.prepared import Prepared
from tinsmith.store.rows import WorkerId
from tinsmith.store.schema import replays
from tinsmith.types import OpId

_NEW = Prepared(insert(replays).values(op_id=bindparam("id"), num_begun=1))
_AGAIN = Prepared(update(replays).where(replays.c.op_id == bindparam("id")).values(num_begun=replays.c.num_begun + 1))
_END = Prepared(delete(replays).where(replays.c.op_id == bindparam("id")))
_LIST = select(replays.c.op_id, blame(replays.c.num_begun, replays.c.excused).label("num_deaths"))


class Replays:
    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, worker: WorkerId, op_ids: Collection[OpId]) -> None:
        """These are to be computed again now.

        Raises:
            FencedError: the worker's place was taken.
        """
        with self._database.write(is_durable=False) as conn:
            require_current(conn, worker)
            for op_id in op_ids:
                if not _AGAIN.run(conn, {"id": op_id}):
                    _NEW.run(conn, {"id": op_id})

    def end(self, worker: WorkerId, op_ids: Collection[OpId]) -> None:
        """The worker has outlived them.

        Raises:
            FencedError: the worker's place was taken.
        """
        with self._database.write(is_durable=False) as conn:
            require_current(conn, worker)
            _END.run_many(conn, [{"id": op_id} for op_id in op_ids])

    def begun(self) -> dict[OpId, int]:
        """How often each was begun and not ended: by as many workers that died, or by one that is at it.

        Those that were killed from outside don't count.
        """
        with self._database.read() as conn:
            return {row.op_id: row.num_deaths for row in conn.execute(_LIST)}

    def forget(self) -> None:
        """Give each a new chance: the server was started anew, perhaps with another version or more memory."""
        if self.begun():
            with self._database.write() as conn:
                conn.execute(delete(replays))
