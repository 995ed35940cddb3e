"""The only loop: look ▸ plan ▸ run ▸ record.

One thread owns the engine. Each turn looks at the rows (when a bell or a finished step says that something may have
changed, and in any case every `scan_interval_s`), takes one batch from the scheduler, computes it, hands the outcomes
to the recorder, and advances the resident samples. Training passes take turns pack by pack, and so do training and
sampling: after each pack the sampler has as long as the pack took, times the setting `sampling_share`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil

import structlog

from tinsmith.config import Settings
from tinsmith.engine import Engine
from tinsmith.errors import CapacityError, CorruptError, FencedError
from tinsmith.files.blobs import Blobs
from tinsmith.ipc.bell import Bell, Ringer
from tinsmith.ipc.notes import rows_in
from tinsmith.ipc.tokenline import TokenSender
from tinsmith.observe.about import about
from tinsmith.scheduler import Batch, Limits, plan
from tinsmith.store import Store
from tinsmith.store.rows import OpRow, WorkerId
from tinsmith.types import OpId, OpKind, Role, RunId
from tinsmith.worker.accounts import Accounts, candidate_of
from tinsmith.worker.barriers import Barriers
from tinsmith.worker.busy import Busy
from tinsmith.worker.claims import Claims, Rings
from tinsmith.worker.decode import Payloads
from tinsmith.worker.decode_ahead import DecodeAhead
from tinsmith.worker.outcomes import INTERNAL, failed
from tinsmith.worker.passes import IDLE_PACK_S, Passes
from tinsmith.worker.publishing import Publisher
from tinsmith.worker.queue_view import QueueView
from tinsmith.worker.readahead import ReadAhead
from tinsmith.worker.recorder import Recorder
from tinsmith.worker.residency import MAX_NEW_RUNS
from tinsmith.worker.runs import HeldRuns
from tinsmith.worker.samples import Samples
from tinsmith.worker.settling import Settling
from tinsmith.worker.suspects import Suspects
from tinsmith.worker.telling import Telling
from tinsmith.worker.unwritten import Unwritten
from tinsmith.worker.watch import Watch
from tinsmith.worker.watchdog import Watchdog
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")

MAX_SAMPLES = 8192  # requests in the engine, of all tenants; it decides whose sequences are decoded together
BARRIERS_S = 0.25  # after so much time without a pass, a pass that waits goes first
CANCEL_CHECK_S = 0.05  # between two looks for cancelled samples, however often the bell rings


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
        line: TokenSender | None = None,
        role: Role = Role.ALL,
        busy: Busy | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """`bell` rouses this loop, `wake` rings it from another thread, `api` tells the API process of outcomes, `line`
        of samples under way. `watchdog` is told of each piece of work."""
        self._me = me
        self._store = store
        self._engine = engine
        self._settings = settings
        self._bell = bell
        self._base = engine.info.name
        self._role = role
        self._busy_clock = busy or Busy()
        self._watchdog = watchdog or Watchdog()
        self._payloads = Payloads(blobs, engine.info)
        self._watch = Watch(me.slot, store, engine, settings)
        self._queue = QueueView(me, self._base, store, settings.scan_interval_s, role)
        rings = Rings(api, wake, self._queue)
        self._recorder = Recorder(me, store, blobs, rings, settings.inline_bytes, self._watch.recorded)
        self._wake = wake
        self._writer = Writer(wake)
        self._ahead = ReadAhead(blobs, engine.host_row, settings.host_cache_mib * 2**20, wake)
        self.runs = HeldRuns(me, self._base, store, blobs, engine, settings, self._writer, self._recorder, self._ahead)
        self._unwritten = Unwritten(settings.resident_adapters_mib * 2**20)
        self._publisher = Publisher(me, store, blobs, engine, self._writer, self._recorder, self._unwritten)
        self._claims = Claims(me, store, self._queue, self.runs)
        self._suspects = Suspects()
        self._settling = Settling(
            self.runs, self._claims, self._queue, self._recorder, self._suspects, self._has_more, self._go_on
        )
        self._barriers = Barriers(
            engine, store, blobs, self._payloads, self.runs, self._writer, self._publisher, self._unwritten,
            self._settling.settle_save, role,
        )  # fmt: skip
        self._accounts = Accounts(store, settings.scan_interval_s)
        self._samples = Samples(
            engine, store, blobs, self._payloads, self._publisher, self._ahead, self._accounts,
            Telling(engine, line), self._watch.use,
        )  # fmt: skip
        self._decoded = DecodeAhead(Payloads(blobs, engine.info))
        self._passes = Passes(engine, self._payloads, self._decoded, self.runs, self._accounts)
        self._busy: frozenset[RunId] = frozenset()
        self._barriers_s = 0.0
        self._looked_at = float("-inf")
        self._heard_at = float("-inf")
        self._has_news = False
        self._must_look = True
        self._must_plan = True
        self._has_looked = False

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; the batch under way is finished and recorded.

        Raises:
            FencedError: another worker has taken this one's place; nothing more may be written.
            CapacityError, CorruptError: outcomes can't be recorded; the next worker computes them again.
        """
        self._recorder.start(self._wake)
        try:
            while not stop.is_set():
                if self.step():
                    continue
                self._watchdog.rest()
                if self._bell.wait(self._settings.scan_interval_s):
                    self._hear()
            self._watchdog.begin()
            self.close()
            self._watchdog.rest()
        finally:
            self._recorder.stop()

    def step(self) -> bool:
        """One turn. False if there was nothing to do."""
        self._watchdog.begin()
        self._recorder.check()
        worked = self._writer.drain()
        if self._is_rung():
            self._hear()
        if worked or time.monotonic() - self._looked_at > self._settings.scan_interval_s:
            self._must_look = True
        batch = (
            self._look()
            if (self._must_look or self._must_plan) and not self._suspects.are_among(self._samples.resident)
            else None
        )
        started = time.monotonic()
        if batch is not None:
            self._run(batch)
        barriers_s = time.monotonic() - started if batch is not None and batch.barriers else 0.0
        self._sample_for(self._settings.sampling_share * (barriers_s + self._advance()))
        self._publisher.write()
        self.runs.snapshot_due()
        self._watch.levels(len(self.runs.residency), self._busy_clock.seconds)
        computing = self._passes.runs
        if self.runs.evict(self._busy | computing, computing):
            self._must_look = self._must_plan = True
        if self._settings.workers_per_base > 1 and self._role.trains and self.runs.rebalancing.is_due:
            queued = frozenset(op.run_id for op in self._queue.ops if op.run_id is not None)
            self.runs.give(queued, self._passes.runs)
        is_busy = worked or batch is not None or self._must_plan or len(self._passes) + self._engine.num_samples > 0
        if not is_busy:
            self._recorder.go()
        return is_busy

    def close(self) -> None:
        """Record what is under way, so that the next worker starts without replays; give everything back."""
        self._drop_cancelled()
        self._store.ops.unclaim(self._me, [op.id for op in self._samples.abandon()])
        while self._passes:
            self._advance()
        self._publisher.write()
        self._writer.flush()
        self.runs.snapshot_all()
        self._writer.flush()
        self._writer.close()
        self._ahead.close()
        self._decoded.close()
        self.runs.release_all()

    def _is_rung(self) -> bool:
        """Whether something may have come: new requests, or the news that samples were cancelled, which ends them."""
        is_rung = self._bell.wait(0.0)
        self._has_news = self._has_news or is_rung
        waited_s = time.monotonic() - self._heard_at
        if waited_s > (CANCEL_CHECK_S if self._has_news else self._settings.scan_interval_s):
            self._has_news = False
            self._heard_at = time.monotonic()
            self._drop_cancelled()
        return is_rung

    def _hear(self) -> None:
        """After a ring: look, unless it told of all that has come, and nothing more has to be known to begin."""
        told = rows_in(self._bell.notes())
        if told is None or not all(map(self.runs.is_next, told)) or not self._queue.has_told(told):
            self._must_look = True
        self._must_plan = True

    def _drop_cancelled(self) -> None:
        used = self._samples.drop_cancelled()
        if used:
            self._recorder.meter(used)

    def _look(self) -> Batch | None:
        if self._must_look:
            self._looked_at = time.monotonic()
            if self._role.trains and self.runs.lease():
                self._queue.distrust()
            self._queue.look()
        self._must_look = self._must_plan = False
        self._has_looked = True
        open_ops = [
            candidate_of(op, self._suspects, is_resident=op.run_id is None or self._engine.has_run(op.run_id))
            for op in self._runnable()
        ]
        waiting = open_ops + self.runs.replay_candidates(self._suspects)
        self._busy = frozenset(c.run_id for c in waiting if c.run_id is not None)
        candidates = self._passes.beside(waiting)
        trained, sampled = self._accounts.enter(candidates, self._passes.tenants, self._samples.tenants)
        chosen = self.runs.choose(candidates, trained)
        batch = plan(chosen, self._limits(), trained, sampled) if chosen else None
        self._accounts.took(batch)
        return batch

    def _runnable(self) -> list[OpRow]:
        """Queued ops; of the samples those whose weights are here, of the saves those for which there is memory."""
        samples = self._samples.ready([op for op in self._queue.ops if op.kind is OpKind.SAMPLE])
        return self._unwritten.runnable(op for op in self._queue.ops if op.kind is not OpKind.SAMPLE) + samples

    def _limits(self) -> Limits:
        num_samples = self._engine.num_samples
        return Limits(
            self._passes.pass_work(),
            min(MAX_SAMPLES - num_samples, self._share_of_samples()),
            num_samples,
            max_tenant_samples=self._settings.max_resident_samples,
            tenant_samples=Counter(op.tenant_id for op in self._samples.resident),
            max_new_runs=MAX_NEW_RUNS,
            passes_first=self._barriers_s > BARRIERS_S,
        )

    def _share_of_samples(self) -> int:
        """How many of those that wait are taken at a look: other workers of the base look at the same moment."""
        num_workers = self._settings.workers_per_base
        return MAX_SAMPLES if num_workers == 1 else ceil(self._queue.num_samples / num_workers)

    def _run(self, batch: Batch) -> None:
        """Claim and compute one batch. Anything unforeseen fails the batch's ops, one by one, and leaves no trace."""
        self._must_plan = True
        claimed, replays = self._claim(batch)
        self._admit([op for op in claimed if op.kind is OpKind.SAMPLE])
        ops = [op for op in claimed if op.kind is not OpKind.SAMPLE]
        try:
            if batch.barriers:
                self._run_barriers(ops, replays)
            elif ops:
                self._barriers_s = 0.0
                self._passes.begin(ops, replays, is_suspect=any(c.is_suspect for c in batch.passes))
        except (FencedError, CapacityError, CorruptError):
            raise  # of the database: no op is to blame, and the next worker finds them all
        except Exception as error:
            log.exception("batch failed", **about(ops))
            self._settling.contain(ops, replays, error)

    def _claim(self, batch: Batch) -> tuple[list[OpRow], set[OpId]]:
        claimed = self._claims.take(batch)
        self._settling.commit(claimed.poisoned)
        return claimed.ops, claimed.replays

    def _run_barriers(self, ops: Sequence[OpRow], replays: set[OpId]) -> None:
        self._settling.begin_saves(ops)
        started = time.perf_counter()
        with self._watchdog.at(ops), self._busy_clock:
            outcomes = self._barriers.carry_out(ops, replays)
        self._settling.end_saves(outcomes)
        seconds = time.perf_counter() - started
        self._barriers_s += seconds
        self._settling.settle(outcomes, replays, seconds / max(1, len(ops)))

    def _advance(self) -> float:
        """Compute a pack of the pass whose turn it is; at its end, record it. The seconds that it took."""
        current = self._passes.next()
        if current is None:
            return 0.0
        before = current.seconds
        self._recorder.go()
        if self._has_looked:
            self._has_looked = False
            self._decoded.want(self._queue.ops, self._engine.pass_max_tokens)
        try:
            cap_s = self._settings.pass_cap_ms / 1000 if self._engine.num_samples else IDLE_PACK_S
            work = self._passes.pack_work(current, cap_s)
            expected_s = self._engine.pass_max_tokens / current.speed if current.speed else None
            with self._watchdog.at(current.ops, expected_s), self._busy_clock:
                is_whole = not current.advance(work)
                outcomes = current.commit() if is_whole else []
            if is_whole:
                self._passes.end(current)
                self._settling.settle(outcomes, current.replays, current.seconds / max(1, len(current.ready)))
                self._must_plan = True
        except (FencedError, CapacityError, CorruptError):
            raise
        except Exception as error:
            log.exception("pass failed", **about(current.ops))
            self._passes.end(current)
            self._settling.contain(current.ops, current.replays, error)
        seconds = current.seconds - before
        self._passes.spent(current, seconds)
        return seconds

    def _sample_for(self, seconds: float) -> None:
        """Advance the resident samples by a token, and then by more until the time is up or none is left."""
        until = time.perf_counter() + seconds
        while self._engine.num_samples:
            self._step_samples()
            if time.perf_counter() >= until:
                return
            if self._is_rung():
                self._admit_samples()

    def _step_samples(self) -> None:
        self._recorder.go()
        try:
            with self._watchdog.at(self._samples.resident), self._busy_clock:
                outcomes = self._samples.step()
        except Exception:
            abandoned = self._samples.abandon()
            log.exception("sampler step failed", **about(abandoned))
            if len(abandoned) == 1:
                outcomes = [failed(abandoned[0], INTERNAL)]
            else:
                outcomes = []
                self._suspects |= {op.id for op in abandoned}
                self._settling.unclaim([op.id for op in abandoned])
        self._settling.commit(outcomes)
        self._suspects -= {outcome.op.id for outcome in outcomes}

    def _admit_samples(self) -> None:
        self._must_look = True
        self._queue.look()
        waiting = [candidate_of(op, self._suspects) for op in self._runnable() if op.kind is OpKind.SAMPLE]
        if self._suspects.are_among(self._samples.resident) or any(sample.is_suspect for sample in waiting):
            return
        batch = plan(waiting, self._limits(), sampled=self._accounts.enter_samples(waiting, self._samples.tenants))
        if batch is not None:
            self._accounts.took(batch)
            ops, _ = self._claim(batch)
            self._admit(ops)

    def _admit(self, ops: Sequence[OpRow]) -> None:
        for op in ops:
            try:
                refused = self._samples.admit(op)
            except Exception:
                log.exception("sample refused", **about([op]))
                refused = failed(op, INTERNAL)
            if refused is not None:
                self._settling.commit([refused])

    def _has_more(self) -> bool:
        return len(self._passes) > 0 or self._engine.num_samples > 0 or len(self._queue.ops) > 0

    def _go_on(self, must_look: bool) -> None:
        self._must_plan = True
        self._must_look = self._must_look or must_look
