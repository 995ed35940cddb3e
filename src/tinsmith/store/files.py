"""Stored files as rows know them, asked by the file: for whoever finds some that no row may need, or counts bytes.

What stays true: a file counts as named if anything at all refers to it, or if its deletion is due anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Select, bindparam, func, select

from tinsmith.store.database import Database
from tinsmith.store.schema import checkpoints, custom_losses, dead_blobs, ops, runs, samplers
from tinsmith.types import BlobKey

PAGE = 500

_OF_OPS = select(ops.c.payload_blob, ops.c.result_blob, ops.c.routes_blob).where(
    ops.c.op_id.in_(bindparam("op_ids", expanding=True))
)
_PINNED = select(ops.c.pin_blob).where(
    ops.c.pin_blob.is_not(None), ops.c.pin_blob.in_(bindparam("blobs", expanding=True))
)
_BY_BLOB: Sequence[Select[tuple[str]]] = (
    _PINNED,
    *(
        select(column).where(column.in_(bindparam("blobs", expanding=True)))
        for column in (
            samplers.c.blob, checkpoints.c.blob, custom_losses.c.blob, runs.c.snapshot_blob,
            runs.c.previous_blob, dead_blobs.c.blob,
        )
    ),
)  # fmt: skip


_KEPT = select(checkpoints.c.blob, checkpoints.c.size_bytes).distinct().subquery()
_CHECKPOINT_BYTES = select(func.coalesce(func.sum(_KEPT.c.size_bytes), 0))


class Files:
    def __init__(self, database: Database) -> None:
        self._database = database

    def checkpoint_bytes(self) -> int:
        """Of the files of all checkpoints; one that several share counts once."""
        with self._database.read() as conn:
            return int(conn.execute(_CHECKPOINT_BYTES).scalar_one())

    def orphans(self, keys: Iterable[BlobKey]) -> set[BlobKey]:
        """Those of the files that no row names."""
        left = set(keys)
        unique = sorted(left)
        for at in range(0, len(unique), PAGE):
            page = unique[at : at + PAGE]
            with self._database.read() as conn:
                for query in _BY_BLOB:
                    left.difference_update(conn.execute(query, {"blobs": page}).scalars())
                op_ids = [key.rpartition("/")[2].partition(".")[0] for key in page]
                for named in conn.execute(_OF_OPS, {"op_ids": op_ids}):
                    left -= set(named)
        return left
