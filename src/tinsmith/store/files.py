"""Stored files as rows know them, asked by the file: for whoever finds some that no row may need, or counts bytes.

What stays true: a file counts as named if anything at all refers to it, or if its deletion is due anyway.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from sqlalchemy import JSON, Select, Text, bindparam, case, cast, func, literal, select

from tinsmith.files.blobs import tenant_of
from tinsmith.store.database import Database
from tinsmith.store.fences import IS_QUEUED
from tinsmith.store.prepared import Prepared
from tinsmith.store.quota_rules import SAVED_PARTS
from tinsmith.store.schema import checkpoints, custom_losses, dead_blobs, ops, runs, samplers, sessions, tenants
from tinsmith.types import BlobKey, TenantId

PAGE = 500
ROW_BYTES = 512  # what a row takes beside its texts, with its index entries
SAMPLE = 2000  # rows of requests from which those of all are estimated: a tenant with a tenth of them to 7 % or so

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


# What one tenant may name of another's: a checkpoint, a sampler's weights, and what a request still needs.
_SHAREABLE = tuple(
    select(blob.label("blob"), table.c.tenant_id)
    for table, blob in (
        (checkpoints, checkpoints.c.blob), (samplers, samplers.c.blob), (ops, ops.c.pin_blob),
    )
)  # fmt: skip


_NAMES = select(tenants.c.tenant_id, tenants.c.name)
_ROWS = (
    select(
        sessions.c.tenant_id,
        func.count() * ROW_BYTES
        + func.sum(func.length(cast(sessions.c.tags, Text)) + func.length(cast(sessions.c.user_metadata, Text))),
    ).group_by(sessions.c.tenant_id),
    select(
        runs.c.tenant_id, func.count() * ROW_BYTES + func.sum(func.length(cast(runs.c.user_metadata, Text)))
    ).group_by(runs.c.tenant_id),
    select(samplers.c.tenant_id, func.count() * ROW_BYTES).group_by(samplers.c.tenant_id),
    select(
        checkpoints.c.tenant_id,
        func.count() * ROW_BYTES + func.sum(func.length(cast(checkpoints.c.user_metadata, Text))),
    ).group_by(checkpoints.c.tenant_id),
    select(
        ops.c.tenant_id,
        func.sum(
            runs.c.adapter_bytes
            * case(*((ops.c.kind == kind.value, parts) for kind, parts in SAVED_PARTS.items()), else_=0)
        ),
    )
    .join(runs, runs.c.run_id == ops.c.run_id)
    .where(IS_QUEUED, ops.c.kind.in_([kind.value for kind in SAVED_PARTS]))
    .group_by(ops.c.tenant_id),
)


_NUMBERS = Prepared(select(func.min(ops.c.num), func.max(ops.c.num)))
_DRAWN = func.json_each(bindparam("numbers", type_=JSON)).table_valued("value")
_SAMPLED = Prepared(
    select(
        ops.c.tenant_id,
        func.sum(
            ROW_BYTES + func.coalesce(func.length(ops.c.payload), 0) + func.coalesce(func.length(ops.c.result), 0)
        ),
    )
    .join_from(_DRAWN, ops, ops.c.num == _DRAWN.c.value)
    .group_by(ops.c.tenant_id)
)


class Files:
    def __init__(self, database: Database) -> None:
        self._database = database

    def checkpoint_bytes(self) -> int:
        """Of the files of all checkpoints; one that several share counts once."""
        with self._database.read() as conn:
            return int(conn.execute(_CHECKPOINT_BYTES).scalar_one())

    def tenant_names(self) -> Mapping[TenantId, str]:
        """Of all tenants."""
        with self._database.read() as conn:
            return {row.tenant_id: row.name for row in conn.execute(_NAMES)}

    def row_bytes(self) -> Mapping[TenantId, int]:
        """About what each tenant's rows take, and what the saves that it has queued will. Those of requests are far too
        many to be counted at each look, and are estimated from some of them, with what is stored in them."""
        found: Counter[TenantId] = Counter()
        with self._database.read() as conn:
            for query in _ROWS:
                for tenant_id, num_bytes in conn.execute(query):
                    found[tenant_id] += int(num_bytes or 0)
            first, last = _NUMBERS.first(conn, {})
            if last is not None:
                step = max(1.0, (last - first + 1) / SAMPLE)
                strata = range(min(SAMPLE, last - first + 1))
                numbers = sorted({int(first + (stratum + random.random()) * step) for stratum in strata})
                for tenant_id, num_bytes in _SAMPLED.all(conn, {"numbers": numbers}):
                    found[tenant_id] += int(num_bytes * step)
        return found

    def left_to_others(self) -> Mapping[BlobKey, Set[TenantId]]:
        """Files that the tenant who made them names no more, and that others keep by a copy, a sampler or a run."""
        keepers: defaultdict[BlobKey, set[TenantId]] = defaultdict(set)
        with self._database.read() as conn:
            for query in _SHAREABLE:
                blob, tenant_id = query.selected_columns
                own = literal("tenants/") + tenant_id + "/"
                is_foreign = func.substr(blob, 1, func.length(own)) != own
                for row in conn.execute(query.where(blob.is_not(None), is_foreign)):
                    keepers[row.blob].add(row.tenant_id)
            blobs = sorted(keepers)
            for at in range(0, len(blobs), PAGE):
                for query in _SHAREABLE:
                    blob, _ = query.selected_columns
                    named = query.where(blob.is_not(None), blob.in_(blobs[at : at + PAGE]))
                    for row in conn.execute(named):
                        if row.tenant_id == tenant_of(row.blob):
                            keepers.pop(row.blob, None)
        return keepers

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
