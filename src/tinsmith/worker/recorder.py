"""Records outcomes beside the loop: their bytes are written, large ones to files, then one transaction, then the bell.

While the engine computes, a thread writes what was computed before. What stays true:

* Outcomes are recorded in the order in which they were handed over, each group in one transaction.
* What wasn't recorded is computed again by the next worker, and by it alone: nothing that takes an outcome for granted
  (a snapshot, a sampler's file, a run that is given back) is recorded before it. Such a writer takes a `mark` when it
  copies a state and waits for it.
* What waits is bounded, in number and bytes; beyond that the loop waits.
* Once something couldn't be recorded nothing more is, and the loop ends with the same error.

The loop claims what it computes next before the thread begins (`go`), since a claim would wait for the transaction.
Where it has nothing else to do it records by itself, which is quicker than a hand-over; so does it always before
`start`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import structlog
from msgspec.structs import replace as replace_in

from tinsmith.crashpoints import crash_point
from tinsmith.errors import CapacityError, CorruptError, StorageFullError
from tinsmith.files.blobs import Blobs, result_key, routes_key
from tinsmith.ipc.bell import PLAIN
from tinsmith.ipc.notes import note_of
from tinsmith.observe.about import about
from tinsmith.store import Store
from tinsmith.store.rows import Finished, OpRow, WorkerId
from tinsmith.store.usage_rows import Usage
from tinsmith.types import OpKind
from tinsmith.worker.outcomes import Outcome

log = structlog.get_logger("tinsmith.worker")

STORAGE_RETRY_S = 0.5
STORAGE_PATIENCE_S = 60.0
MAX_WAITING = 1024  # outcomes that aren't recorded yet
MAX_WAITING_BYTES = 64 * 2**20  # of their results; a single one may be larger
MAX_GROUP = 256  # outcomes in a transaction
MAX_GROUP_BYTES = 8 * 2**20
SWITCH_S = 0.001  # how long this thread waits before it is given the interpreter, some ten times a transaction
TOLD = (OpKind.FORWARD, OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP)
MOST_HELD_S = 0.02  # until it is recorded though the loop isn't computing


class Rings(Protocol):
    """Whoever wants to know that outcomes were recorded."""

    def ring(self, note: bytes) -> None: ...


class _Storage:
    """Writes outcomes where the API finds them. A full disk or a busy database is waited for, until `is_stopped`."""

    def __init__(
        self,
        me: WorkerId,
        store: Store,
        blobs: Blobs,
        api: Rings,
        inline_bytes: int,
        recorded: Callable[[Sequence[Outcome]], None],
    ) -> None:
        self._me = me
        self._store = store
        self._blobs = blobs
        self._api = api
        self._inline_bytes = inline_bytes
        self._recorded = recorded
        self.is_stopped = False

    def record(self, outcomes: Sequence[Outcome]) -> None:
        encoded = [outcome.encoded() for outcome in outcomes]
        self._patiently(lambda: self._write(encoded), [each.op for each in encoded])
        self._recorded(encoded)

    def meter(self, used: Sequence[tuple[OpRow, Usage]]) -> None:
        by_id = {op.id: usage for op, usage in used}
        self._patiently(lambda: self._store.endings.meter(self._me, by_id, time.time()), [op for op, _ in used])

    def _write(self, outcomes: Sequence[Outcome]) -> None:
        finished = [self._spill(outcome) for outcome in outcomes]
        crash_point("recorder.after_result_files")
        now = time.time()
        new = self._store.ops.finish(self._me, finished, now)
        told = [_ended(outcome.op, each, now) for outcome, each in zip(outcomes, finished, strict=True)]
        crash_point("recorder.before_ring")
        self._api.ring(note_of(told) if len(new) == len(finished) else PLAIN)

    def _spill(self, outcome: Outcome) -> Finished:
        finished = outcome.finished
        if finished.routes is not None:
            stored = self._blobs.put(routes_key(outcome.op.tenant_id, outcome.op.id), finished.routes)
            finished = replace(finished, routes=None, routes_blob=stored.key)
        if finished.result is None or len(finished.result) <= self._inline_bytes:
            return finished
        key = result_key(outcome.op.tenant_id, outcome.op.id)
        return replace(finished, result=None, result_blob=self._blobs.put(key, finished.result).key)

    def _patiently(self, write: Callable[[], object], ops: Sequence[OpRow]) -> None:
        """What was computed for these isn't lost to a full disk or a busy database: it is tried for a while.

        Raises:
            CapacityError, CorruptError: the storage didn't come back; never an OSError, which a pass may raise too.
        """
        deadline = time.monotonic() + STORAGE_PATIENCE_S
        while True:
            try:
                write()
                return
            except (CapacityError, CorruptError, OSError) as error:
                if time.monotonic() > deadline or self.is_stopped:
                    if isinstance(error, OSError):
                        raise StorageFullError(f"results can't be written ({error}): free space on the disk") from error
                    raise
                log.error("outcomes can't be recorded; trying again", **about(ops), error=str(error))
                time.sleep(STORAGE_RETRY_S)


def _ended(op: OpRow, finished: Finished, now: float) -> OpRow | None:
    """The row as it was recorded; None where more was recorded than its outcome, or that is in a file."""
    if op.kind not in TOLD or finished.result_blob is not None:
        return None
    return replace_in(
        op, state=finished.state, finished_at=now, failure=finished.failure, result=finished.result,
        result_media=finished.media, result_bytes=finished.result_bytes,
    )  # fmt: skip


class Recorder:
    def __init__(
        self,
        me: WorkerId,
        store: Store,
        blobs: Blobs,
        api: Rings,
        inline_bytes: int,
        recorded: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
    ) -> None:
        """`api` is rung once outcomes can be fetched; then `recorded` is told of them, on the thread that recorded."""
        self._storage = _Storage(me, store, blobs, api, inline_bytes, recorded)
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Outcome] = deque()
        self._num_bytes = 0  # of what waits and of what is being recorded
        self._num_given = 0
        self._num_recorded = 0
        self._error: BaseException | None = None
        self._may_go = False

    def start(self, wake: Callable[[], None]) -> None:
        """Record on a thread from now on; `wake` rouses the loop if that fails."""
        sys.setswitchinterval(SWITCH_S)
        self._thread = threading.Thread(target=self._work, args=(wake,), name="recorder", daemon=True)
        self._thread.start()

    def record(self, outcomes: Sequence[Outcome], *, at_once: bool = False) -> None:
        """Have these recorded, after all those before. From the loop's thread alone.

        at_once: the loop has nothing else to do. If nothing waits either, they are recorded when this returns.

        Raises:
            FencedError: this worker's place was taken; neither these nor any after them are recorded.
            CapacityError, CorruptError: the storage didn't come back.
        """
        with self._changed:
            self.check()
            is_behind = self._num_given > self._num_recorded
            if self._thread is not None and (is_behind or not at_once):
                for outcome in outcomes:
                    self._give(outcome)
                return
        self._storage.record(outcomes)

    def go(self) -> None:
        """The loop computes, or waits: what was handed over is recorded now."""
        if self._waiting:
            with self._changed:
                self._may_go = True
                self._changed.notify_all()

    def mark(self) -> int:
        """Stands for all that was handed over until now."""
        return self._num_given

    def wait(self, mark: int) -> None:
        """Until that is recorded. From any thread.

        Raises:
            The error that keeps it from ever being recorded.
        """
        with self._changed:
            while self._num_recorded < mark:
                self.check()
                self._may_go = True
                self._changed.notify_all()
                self._changed.wait()

    def flush(self) -> None:
        """Wait for all that was handed over. Raises: as `wait`."""
        self.wait(self.mark())

    def check(self) -> None:
        """Raises: what keeps outcomes from being recorded, if anything does."""
        if self._error is not None:
            raise self._error

    def meter(self, used: Sequence[tuple[OpRow, Usage]]) -> None:
        """What was computed for requests that were cancelled meanwhile. Raises: as `record`, of this alone."""
        self._storage.meter(used)

    def stop(self) -> None:
        """End the thread, once it has recorded what it is at. What still waits is not recorded."""
        with self._changed:
            self._storage.is_stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _give(self, outcome: Outcome) -> None:
        while self._num_given > self._num_recorded and self._is_full(outcome):
            self._may_go = True
            self._changed.notify_all()
            self._changed.wait()
            self.check()
        self._waiting.append(outcome)
        self._num_bytes += outcome.num_bytes
        self._num_given += 1
        self._changed.notify_all()

    def _is_full(self, outcome: Outcome) -> bool:
        num_open = self._num_given - self._num_recorded
        return num_open >= MAX_WAITING or self._num_bytes + outcome.num_bytes > MAX_WAITING_BYTES

    def _work(self, wake: Callable[[], None]) -> None:
        group: list[Outcome] = []
        try:
            while group := self._take():
                self._storage.record(group)
                with self._changed:
                    self._num_recorded += len(group)
                    self._num_bytes -= sum(outcome.num_bytes for outcome in group)
                    self._changed.notify_all()
        except BaseException as error:
            ops = about([outcome.op for outcome in group])
            log.error("outcomes were not recorded; the worker ends", **ops, error=str(error), exc_info=error)
            self._fail(error)
            wake()
        else:
            self._fail(RuntimeError("the recorder was stopped"))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _take(self) -> list[Outcome]:
        """What goes into the next transaction; nothing once the recorder is stopped."""
        with self._changed:
            while not self._waiting and not self._storage.is_stopped:
                self._changed.wait()
            until = time.monotonic() + MOST_HELD_S
            while not (self._may_go or self._storage.is_stopped) and self._changed.wait(until - time.monotonic()):
                pass
            group: list[Outcome] = []
            num_bytes = 0
            while self._waiting and not self._storage.is_stopped and len(group) < MAX_GROUP:
                num_bytes += self._waiting[0].num_bytes
                if group and num_bytes > MAX_GROUP_BYTES:
                    break
                group.append(self._waiting.popleft())
            self._may_go = len(self._waiting) > 0
            return group
