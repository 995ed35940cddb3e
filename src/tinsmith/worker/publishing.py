"""Samplers without a name: usable at once, their files written behind.

A run's weights are copied where they are, and the request is answered; the sampler's row names the key under which the
file is to come, and the op after which the run had these weights. What stays true: an acknowledged sampler is never
lost. Until its file is there no snapshot of the run goes past that op (`HeldRun.num_saves`), so a run whose worker died
is computed again up to it, and its weights are published again under the same key; samples wait meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from tinsmith.crashpoints import crash_point
from tinsmith.engine import Engine
from tinsmith.files.blobs import BlobInfo, Blobs
from tinsmith.files.checkpoint_file import state_pieces
from tinsmith.store import Store
from tinsmith.store.rows import WorkerId
from tinsmith.types import BlobKey, RunState
from tinsmith.worker.held import HeldRun
from tinsmith.worker.recorder import Recorder
from tinsmith.worker.unwritten import Unwritten
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")

RETRY_S = 1.0
NUM_PARTS = 4  # of a run's bytes: weights, gradients and two moments


@dataclass(frozen=True, slots=True, eq=False)
class _Promise:
    """on_host gives the weights, of about so many bytes; not_before: when to write them, on the monotonic clock."""

    held: HeldRun
    key: BlobKey
    on_host: Callable[[], RunState]
    num_bytes: int
    not_before: float = 0.0


class Publisher:
    def __init__(
        self,
        me: WorkerId,
        store: Store,
        blobs: Blobs,
        engine: Engine,
        writer: Writer,
        recorder: Recorder,
        unwritten: Unwritten,
    ) -> None:
        self._me = me
        self._store = store
        self._blobs = blobs
        self._engine = engine
        self._writer = writer
        self._recorder = recorder
        self._bytes = unwritten
        self._unwritten: dict[BlobKey, _Promise] = {}
        self._due: list[_Promise] = []

    def publish(self, held: HeldRun, key: BlobKey) -> None:
        """Make the run's weights an adapter now; `write` will write them."""
        num_bytes = self._engine.run_bytes(held.row.spec) // NUM_PARTS
        promise = _Promise(held, key, self._engine.publish_run(held.row.run_id, key), num_bytes)
        crash_point("sampler.published")
        held.num_saves += 1
        self._bytes.add(num_bytes)
        self._unwritten[key] = promise
        self._due.append(promise)

    def restore(self, key: BlobKey) -> bool:
        """Bring unwritten weights back into the sampler, if they are here."""
        promise = self._unwritten.get(key)
        if promise is None:
            return False
        if not self._engine.has_adapter(key):
            self._engine.add_adapter(key, promise.on_host())
        return True

    def holds(self, key: BlobKey) -> bool:
        return key in self._unwritten

    def write(self) -> None:
        """Have the files written of all that was published. To be called once the outcomes are handed over."""
        now = time.monotonic()
        due, self._due = self._due, []
        for promise in due:
            if promise.not_before > now:
                self._due.append(promise)
            else:
                self._submit(promise)

    def _submit(self, promise: _Promise) -> None:
        def written(made: BlobInfo | BaseException) -> None:
            if isinstance(made, BaseException):
                row = promise.held.row
                ids = {"run_id": row.run_id, "tenant_id": row.tenant_id, "key": promise.key}
                log.error("a sampler's file could not be written; trying again", **ids, error=str(made))
                self._due.append(replace(promise, not_before=time.monotonic() + RETRY_S))
                return
            promise.held.num_saves -= 1
            self._bytes.remove(promise.num_bytes)
            if self._unwritten.get(promise.key) is promise:
                del self._unwritten[promise.key]

        mark = self._recorder.mark()
        self._writer.submit(lambda: self._write(promise, mark), written)

    def _write(self, promise: _Promise, mark: int) -> BlobInfo:
        crash_point("sampler.before_file")
        made = self._blobs.put(promise.key, state_pieces(promise.on_host()))
        crash_point("sampler.after_file")
        self._recorder.wait(mark)
        if not self._store.samplers.redeem(self._me, promise.key, made.key):
            self._blobs.delete(made.key)  # the sampler ended, or has newer weights
        crash_point("sampler.after_row")
        return made
