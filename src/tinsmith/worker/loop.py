"""The only loop: look ▸ plan ▸ run ▸ commit.

One thread owns the engine. Each turn looks at the rows (when a bell or a finished step says that something may have
changed, and in any case every `scan_interval_s`), takes one batch from the scheduler, computes it, commits the outcomes
in one transaction, and advances the resident samples by one token. A training pass gives way to the sampler between
packs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import structlog

from tinsmith.bell import Bell, Ringer
from tinsmith.blobs import Blobs
from tinsmith.config import Settings
from tinsmith.engine import Engine, TrainingPass
from tinsmith.errors import FencedError, TinsmithError
from tinsmith.scheduler import Batch, Candidate, Limits, plan
from tinsmith.store import Store
from tinsmith.store.rows import OpRow, WorkerId
from tinsmith.types import Failure, OpId, OpKind, RunId, TenantId, TrainItem, TrainResult
from tinsmith.wire.media import PROTOBUF
from tinsmith.wire.training import encode_train_result
from tinsmith.worker.barriers import Barriers
from tinsmith.worker.decode import Payloads
from tinsmith.worker.outcomes import Outcome, Recorder, failed, succeeded
from tinsmith.worker.runs import HeldRuns
from tinsmith.worker.samples import Samples
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")

MAX_ATTEMPTS = 4  # claims by workers that died before an op is held to be the cause
LOOK_AT_MOST = 4096
MIN_PACK_TOKENS = 64
IDLE_PACK_S = 2.0  # a sample that arrives during a long pass waits no longer than this
POISON = "this request ended its worker process each time it was run, so it isn't run again; send it in smaller parts"
INTERNAL = "the server failed on this request; its log has the details. Nothing of it took effect: send it again"


class Worker:
    def __init__(
        self,
        me: WorkerId,
        store: Store,
        blobs: Blobs,
        engine: Engine,
        settings: Settings,
        bell: Bell,
        api: Ringer,
        wake: Callable[[], None],
    ) -> None:
        """`bell` rouses this loop, `wake` rings it from another thread, `api` tells the API process of outcomes."""
        self._me = me
        self._store = store
        self._engine = engine
        self._settings = settings
        self._bell = bell
        self._base = engine.info.name
        self._payloads = Payloads(blobs)
        self._recorder = Recorder(me, store, blobs, api, settings.inline_bytes)
        self._writer = Writer(wake)
        self.runs = HeldRuns(me, self._base, store, blobs, engine, settings, self._writer)
        self._barriers = Barriers(engine, blobs, self._payloads, self.runs, self._writer, self._settle_save)
        self._samples = Samples(engine, store, blobs, self._payloads)
        self._served: dict[TenantId, float] = {}
        self._saving: set[OpId] = set()
        self._suspects: set[OpId] = set()
        self._busy: frozenset[RunId] = frozenset()
        self._tokens_per_s = 0.0
        self._looked_at = float("-inf")
        self._must_look = True

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; the batch under way is finished and recorded.

        Raises:
            FencedError: another worker has taken this one's place; nothing more may be written.
        """
        while not stop.is_set():
            if not self.step() and self._bell.wait(self._settings.scan_interval_s):
                self._must_look = True
        self.close()

    def step(self) -> bool:
        """One turn. False if there was nothing to do."""
        worked = self._writer.drain()
        if self._bell.wait(0.0) or worked or time.monotonic() - self._looked_at > self._settings.scan_interval_s:
            self._must_look = True
        batch = self._look() if self._must_look else None
        if batch is not None:
            self._run(batch)
        if self._engine.num_samples:
            self._commit(self._samples.step())
        self.runs.snapshot_due()
        self.runs.evict(self._busy)
        return worked or batch is not None or self._engine.num_samples > 0

    def close(self) -> None:
        """Record what is under way, so that the next worker starts without replays; give everything back."""
        self._store.ops.unclaim(self._me, self._samples.abandon())
        self._writer.flush()
        self.runs.snapshot_all()
        self._writer.flush()
        self._writer.close()
        self.runs.release_all()

    def _look(self) -> Batch | None:
        self._must_look = False
        self._looked_at = time.monotonic()
        self.runs.lease()
        open_ops = [
            Candidate(
                op.id, op.tenant_id, op.run_id, op.kind, op.seq_id, op.cost_tokens,
                attempts=op.attempts + (op.id in self._suspects),
            )
            for op in self._store.ops.runnable(self._me, self._base, LOOK_AT_MOST)
        ]  # fmt: skip
        candidates = open_ops + self.runs.replay_candidates()
        self._busy = frozenset(c.run_id for c in candidates if c.run_id is not None)
        limits = Limits(self._settings.pass_max_tokens, self._settings.max_resident_samples - self._engine.num_samples)
        return plan(candidates, limits, self._served)

    def _run(self, batch: Batch) -> None:
        """Claim and compute one batch. Anything unforeseen fails the batch's ops, one by one, and leaves no trace."""
        self._must_look = True
        ops, replays = self._claim(batch)
        try:
            if batch.barriers:
                self._run_barriers([op for op in ops if op.kind is not OpKind.SAMPLE], replays)
            elif batch.passes:
                self._run_pass([op for op in ops if op.kind.is_pass], replays)
            self._commit(self._samples.admit([op for op in ops if op.kind is OpKind.SAMPLE]))
        except FencedError:
            raise
        except Exception:
            log.exception("batch failed", ops=[op.id for op in ops])
            self._contain(ops, replays)

    def _claim(self, batch: Batch) -> tuple[list[OpRow], set[OpId]]:
        replays = {c.op_id for c in batch.ops if c.is_replay}
        claimed = self._store.ops.claim(self._me, [c.op_id for c in batch.ops if not c.is_replay], time.time())
        rows = {op.id: op for op in claimed}
        rows |= {
            c.op_id: self.runs.replayed_op(c.run_id, c.seq_id)
            for c in batch.ops
            if c.is_replay and c.run_id is not None
        }
        return [rows[c.op_id] for c in batch.ops if c.op_id in rows], replays

    def _run_barriers(self, ops: Sequence[OpRow], replays: set[OpId]) -> None:
        self._saving |= {op.id for op in ops if op.kind.is_save}
        started = time.perf_counter()
        outcomes = self._barriers.carry_out(ops)
        self._settle(outcomes, replays, (time.perf_counter() - started) / max(1, len(ops)))

    def _run_pass(self, ops: Sequence[OpRow], replays: set[OpId]) -> None:
        finished: list[Outcome] = []
        ready: list[tuple[OpRow, TrainItem]] = []
        for op in ops:
            try:
                if op.attempts > MAX_ATTEMPTS:
                    raise TinsmithError(POISON)
                self.runs.need(op.run_id)
                ready.append((op, self._payloads.train_item(op)))
            except TinsmithError as error:
                finished.append(failed(op, error.as_failure()))
        started = time.perf_counter()
        results: list[TrainResult | Failure] = []
        if ready:
            training = self._engine.start_pass([item for _, item in ready])
            self._advance(training)
            results = training.commit()
        seconds = (time.perf_counter() - started) / max(1, len(ready))
        for (op, item), result in zip(ready, results, strict=True):
            if isinstance(result, Failure):
                finished.append(failed(op, result))
            else:
                finished.append(succeeded(op, encode_train_result(result), PROTOBUF))
            self._served[op.tenant_id] = self._served.get(op.tenant_id, 0.0) + item.num_tokens
        self._settle(finished, replays, seconds)

    def _advance(self, training: TrainingPass) -> None:
        """Compute the pass pack by pass; between packs the sampler gets its turn."""
        while True:
            started = time.perf_counter()
            stats = training.advance(self._pack_tokens())
            if stats is None:
                return
            speed = stats.num_tokens / max(time.perf_counter() - started, 1e-6)
            self._tokens_per_s = speed if not self._tokens_per_s else 0.7 * self._tokens_per_s + 0.3 * speed
            if self._bell.wait(0.0):
                self._admit_samples()
            if self._engine.num_samples:
                self._commit(self._samples.step())

    def _pack_tokens(self) -> int:
        """A pack's bound: the settings' tokens, and what can be computed until the sampler should get its turn."""
        budget = self._settings.pass_max_tokens
        if not self._tokens_per_s:
            return budget
        cap_s = self._settings.pass_cap_ms / 1000 if self._engine.num_samples else IDLE_PACK_S
        return min(budget, max(MIN_PACK_TOKENS, int(self._tokens_per_s * cap_s)))

    def _admit_samples(self) -> None:
        self._must_look = True
        waiting = [
            Candidate(op.id, op.tenant_id, None, op.kind, op.seq_id, op.cost_tokens)
            for op in self._store.ops.runnable(self._me, self._base, LOOK_AT_MOST)
            if op.kind is OpKind.SAMPLE
        ]
        limits = Limits(0, self._settings.max_resident_samples - self._engine.num_samples)
        batch = plan(waiting, limits, self._served)
        if batch is not None:
            ops, _ = self._claim(batch)
            self._commit(self._samples.admit(ops))

    def _settle(self, outcomes: Sequence[Outcome], replays: set[OpId], seconds: float) -> None:
        """Commit the new outcomes, then count what was applied to each run."""
        self._commit([o for o in outcomes if o.op.id not in replays])
        for outcome in outcomes:
            self.runs.applied(outcome.op, seconds)
            self._suspects.discard(outcome.op.id)

    def _settle_save(self, outcome: Outcome) -> None:
        self._saving.discard(outcome.op.id)
        self._settle([outcome], set(), 0.0)

    def _commit(self, outcomes: Sequence[Outcome]) -> None:
        if outcomes:
            self._recorder.record(outcomes)
            self._must_look = True

    def _contain(self, ops: Sequence[OpRow], replays: set[OpId]) -> None:
        """After an unforeseen error: a lone op fails, several are tried again one by one; their runs are read anew."""
        new = [op for op in ops if op.id not in replays and op.id not in self._saving]
        lone = len(ops) == 1 or any(op.id in self._suspects for op in new)
        if lone:
            self._commit([failed(op, Failure("internal", "server", INTERNAL)) for op in new])
        else:
            self._store.ops.unclaim(self._me, [op.id for op in new])
            self._suspects |= {op.id for op in new}
        self.runs.forget(op.run_id for op in ops if op.run_id is not None)
