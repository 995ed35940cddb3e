"""Files that no row needs any more, remembered until somebody deletes them.

Within the caller's transaction: a file is buried by the same commit that drops its last row, so none is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, bindparam, delete, exists, insert, select

from tinsmith.store.schema import checkpoints, dead_blobs, ops, samplers
from tinsmith.types import BlobKey

_FORGET = delete(dead_blobs).where(dead_blobs.c.blob.in_(bindparam("blobs", expanding=True)))
_BURY = insert(dead_blobs).inline()
_UNNEEDED = (
    select(dead_blobs.c.blob)
    .where(
        dead_blobs.c.died_at <= bindparam("before"),
        ~exists().where(samplers.c.blob == dead_blobs.c.blob),
        ~exists().where(checkpoints.c.blob == dead_blobs.c.blob),
        ~exists().where(ops.c.pin_blob == dead_blobs.c.blob),
    )
    .order_by(dead_blobs.c.died_at)
    .limit(bindparam("limit"))
)


def bury(conn: Connection, blobs: Iterable[BlobKey | None], now: float) -> None:
    """These files may be deleted once nothing else refers to them."""
    unique = sorted({blob for blob in blobs if blob is not None})
    if unique:
        conn.execute(_FORGET, {"blobs": unique})
        conn.execute(_BURY, [{"blob": blob, "died_at": now} for blob in unique])


def unneeded(conn: Connection, before: float, limit: int) -> list[BlobKey]:
    """Files buried before that time to which no sampler, checkpoint or uncovered CREATE or LOAD refers."""
    return list(conn.execute(_UNNEEDED, {"before": before, "limit": limit}).scalars())


def forget(conn: Connection, blobs: list[BlobKey]) -> None:
    conn.execute(_FORGET, {"blobs": blobs})
