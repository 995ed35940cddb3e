"""Between a plan and the engine: ops are claimed in the store before they are computed, or given back untouched."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinsmith.errors import CorruptError, TinsmithError
from tinsmith.ipc.bell import PLAIN, Ringer
from tinsmith.scheduler import Batch
from tinsmith.store import Store
from tinsmith.store.checksums import whole_row
from tinsmith.store.rows import OpRow, WorkerId
from tinsmith.types import Failure, OpId
from tinsmith.worker.outcomes import Outcome, failed
from tinsmith.worker.queue_view import QueueView
from tinsmith.worker.runs import HeldRuns

MAX_ATTEMPTS = 4  # claims by workers that died before an op is held to be the cause
POISON = "this request ended its worker process each time it was run, so it isn't run again; send it in smaller parts"


@dataclass(frozen=True, slots=True)
class Claimed:
    """ops: in the order of the batch, replays among them; poisoned: outcomes of those that are not run again, or not at
    all, since their rows are not what was stored."""

    ops: list[OpRow]
    replays: set[OpId]
    poisoned: list[Outcome]


class Rings:
    """Rings the API when outcomes are recorded, and the loop too if it holds requests back that may begin then."""

    def __init__(self, api: Ringer, wake: Callable[[], None], queue: QueueView) -> None:
        self._api, self._wake, self._queue = api, wake, queue

    def ring(self, note: bytes = PLAIN) -> None:
        self._api.ring(note)
        if self._queue.has_held:
            self._wake()


class Claims:
    def __init__(self, me: WorkerId, store: Store, queue: QueueView, runs: HeldRuns) -> None:
        self._me = me
        self._store = store
        self._queue = queue
        self._runs = runs

    def take(self, batch: Batch) -> Claimed:
        """Claim what is new in a batch; what left the queue meanwhile is not in the answer."""
        replays = {c.op_id for c in batch.ops if c.is_replay}
        if replays:
            self._store.replays.begin(self._me, replays)
        claimed = self.take_queued([c.op_id for c in batch.ops if not c.is_replay])
        poison = TinsmithError(POISON).as_failure()
        often = [op.id for op in claimed if op.attempts > MAX_ATTEMPTS]
        guilty = (
            {op_id for op_id, count in self._store.ops.blames(often).items() if count > MAX_ATTEMPTS}
            if often
            else set()
        )
        poisoned = [failed(op, poison) for op in claimed if op.id in guilty]
        poisoned += [failed(op, changed) for op in claimed if op.id not in guilty and (changed := _changed(op))]
        ended = {outcome.op.id for outcome in poisoned}
        rows = {op.id: op for op in claimed if op.id not in ended}
        rows |= {
            c.op_id: self._runs.replayed_op(c.run_id, c.seq_id)
            for c in batch.ops
            if c.is_replay and c.run_id is not None
        }
        return Claimed([rows[c.op_id] for c in batch.ops if c.op_id in rows], replays, poisoned)

    def take_queued(self, op_ids: Sequence[OpId]) -> list[OpRow]:
        """Those of the ops that are still queued, and that no quota holds back."""
        claimed = self._store.ops.claim(self._me, list(op_ids), time.time())
        self._queue.remove([op.id for op in claimed])
        if len(claimed) < len(op_ids):
            self._queue.hold_back(set(op_ids) - {op.id for op in claimed})
        return claimed

    def replayed(self, ops: Sequence[OpRow]) -> None:
        """They were computed again, or not; either way this worker outlived it."""
        if ops:
            self._store.replays.end(self._me, [op.id for op in ops])

    def give_back(self, op_ids: Sequence[OpId]) -> None:
        """They are queued again, as if they had not been tried."""
        self._store.ops.unclaim(self._me, op_ids)
        self._queue.distrust()


def _changed(op: OpRow) -> Failure | None:
    try:
        whole_row(op)
    except CorruptError as error:
        return error.as_failure()
    return None
