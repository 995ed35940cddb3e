"""Outcomes of ops, and how they are recorded: large results to files first, then one transaction, then the bell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from tinsmith.bell import Ringer
from tinsmith.blobs import Blobs, result_key
from tinsmith.errors import CapacityError, CorruptError
from tinsmith.store import Store
from tinsmith.store.rows import Finished, NewCheckpoint, NewSampler, OpRow, WorkerId
from tinsmith.store.usage_rows import Usage
from tinsmith.types import Failure, OpId, OpState
from tinsmith.wire.media import JSON

log = structlog.get_logger("tinsmith.worker")

STORAGE_RETRY_S = 0.5
STORAGE_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    op: OpRow
    finished: Finished


def succeeded(
    op: OpRow,
    body: bytes,
    media: str = JSON,
    *,
    checkpoint: NewCheckpoint | None = None,
    sampler: NewSampler | None = None,
    usage: Usage | None = None,
) -> Outcome:
    """`usage`: what the ledger is to count for it, beside the checkpoint."""
    finished = Finished(
        op_id=op.id,
        state=OpState.DONE,
        result=body,
        result_bytes=len(body),
        media=media,
        checkpoint=checkpoint,
        sampler=sampler,
        usage=usage,
    )
    return Outcome(op, finished)


def failed(op: OpRow, failure: Failure) -> Outcome:
    return Outcome(op, Finished(op_id=op.id, state=OpState.FAILED, media=JSON, failure=failure))


class Recorder:
    def __init__(self, me: WorkerId, store: Store, blobs: Blobs, api: Ringer, inline_bytes: int) -> None:
        """`api` is rung once outcomes can be fetched."""
        self._me = me
        self._store = store
        self._blobs = blobs
        self._api = api
        self._inline_bytes = inline_bytes

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Raises:
        FencedError: this worker's place was taken; nothing was recorded.
        CapacityError, CorruptError, OSError: the storage didn't come back.
        """
        _patiently(lambda: self._record(outcomes))

    def meter(self, used: Mapping[OpId, Usage]) -> None:
        """What was computed for requests that were cancelled meanwhile. Raises: the same."""
        _patiently(lambda: self._store.endings.meter(self._me, used, time.time()))

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        self._store.ops.finish(self._me, [self._spill(outcome) for outcome in outcomes], time.time())
        self._api.ring()

    def _spill(self, outcome: Outcome) -> Finished:
        finished = outcome.finished
        if finished.result is None or len(finished.result) <= self._inline_bytes:
            return finished
        key = result_key(outcome.op.tenant_id, outcome.op.id)
        return replace(finished, result=None, result_blob=self._blobs.put(key, finished.result).key)


def _patiently(write: Callable[[], object]) -> None:
    """What was computed isn't lost to a full disk or a busy database: it is tried for a while."""
    deadline = time.monotonic() + STORAGE_PATIENCE_S
    while True:
        try:
            write()
            return
        except (CapacityError, CorruptError, OSError) as error:
            if time.monotonic() > deadline:
                raise
            log.error("outcomes can't be recorded; trying again", error=str(error))
            time.sleep(STORAGE_RETRY_S)
