"""The runs that this worker holds: leased, restored, evicted.

Owns the answer to "up to which op is this run's state in memory". What stays true: a run leaves memory only when its
row and files alone can bring it back, and after an error that may have left it half changed it is read anew. A run
whose log or files don't give its state any more is given up, loudly: its requests fail, nothing of it is written, and
the next worker tries again (a backup may have been restored).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import structlog

from tinsmith.config import Settings
from tinsmith.crashpoints import crash_point
from tinsmith.engine import Engine
from tinsmith.errors import CorruptError, NoMemoryError, NotFoundError, TinsmithError, UserError
from tinsmith.fair_queueing import Standing
from tinsmith.files.blobs import Blobs
from tinsmith.machine.clock import Clock
from tinsmith.observe import series
from tinsmith.observe.about import about
from tinsmith.scheduler import SUSPECT, Candidate
from tinsmith.store import Store
from tinsmith.store.rows import OpRow, RunRow, WorkerId
from tinsmith.types import BlobKey, Failure, OpId, RunId, RunState, RunStatus
from tinsmith.worker.held import HeldRun
from tinsmith.worker.outcomes import Outcome, failed
from tinsmith.worker.postponed import LACKS, Postponed
from tinsmith.worker.readahead import ReadAhead
from tinsmith.worker.rebalancing import Rebalancing
from tinsmith.worker.recorder import Recorder
from tinsmith.worker.residency import Residency
from tinsmith.worker.snapshots import Snapshots
from tinsmith.worker.writer import Writer

log = structlog.get_logger("tinsmith.worker")

MAX_REPLAY_DEATHS = 4  # of workers that computed an op of the log again, before it is held to be the cause
MAX_IDLE = 4096  # runs whose lease is kept though they aren't in memory


class HeldRuns:
    """ahead: where states are read beside the loop."""

    def __init__(
        self,
        me: WorkerId,
        base: str,
        store: Store,
        blobs: Blobs,
        engine: Engine,
        settings: Settings,
        writer: Writer,
        recorder: Recorder,
        ahead: ReadAhead,
    ) -> None:
        self._me = me
        self._base = base
        self._store = store
        self._engine = engine
        self._writer = writer
        self._recorder = recorder
        self._ahead = ahead
        self._clock = Clock()
        self._lease_s = settings.lease_s
        self._snapshots = Snapshots(me, store, blobs, engine, settings, writer, recorder, self._on_disk)
        self.residency = Residency(
            engine, self._snapshots, ahead, settings, self._let_go, self._fall_back, store.sessions.ended_among,
            store.gone.among,
        )  # fmt: skip
        self._held: dict[RunId, HeldRun] = {}
        self._replaying: dict[RunId, HeldRun] = {}  # those with replays to come
        self._deaths: dict[OpId, int] = {}  # of workers that computed these finished ops again
        self.postponed = Postponed()
        self._in_debt: dict[RunId, HeldRun] = {}  # those whose state has changed since it was looked for snapshots
        self._idle: dict[RunId, HeldRun] = {}  # leased, not in the engine; the longest ago first
        self._giving: set[RunId] = set()  # whose lease is given back as soon as they have left
        self.rebalancing = Rebalancing(me.slot, lambda: store.burdens.of(base, time.time()))

    def __getitem__(self, run_id: RunId) -> HeldRun:
        return self._held[run_id]

    def lease(self) -> bool:
        """Take the runs of this base that have work and no living holder; whether there were any."""
        can_judge = self._clock.is_even(self._lease_s)  # else the living, too, may seem silent
        now = time.time() if can_judge else 0.0
        given = self.rebalancing.given
        rows = self._store.runs.lease(self._me, self._base, limit=1024, now=now, without=given)
        if rows:
            crash_point("run.after_lease")
            self._deaths = self._store.replays.begun()
        for row in rows:
            self._adopt(row)
        return bool(rows)

    def choose(self, candidates: Sequence[Candidate], trained: Standing) -> list[Candidate]:
        """See `Residency.choose`. Of runs that aren't held, or that wait for memory, there is none."""
        held = [c for c in candidates if c.run_id is None or self._may_run(c.run_id)]
        return self.residency.choose(held, self._held, trained)

    def is_next(self, op: OpRow) -> bool:
        """Whether a request that has just come is the next of a run that is held here, all before it being computed."""
        held = None if op.run_id is None else self._held.get(op.run_id)
        return held is not None and held.given_up is None and not held.replays and op.seq_id == held.applied_seq + 1

    def _may_run(self, run_id: RunId) -> bool:
        return run_id in self._held and not self.postponed.is_waiting(run_id)

    def replay_candidates(self, suspects: AbstractSet[OpId]) -> list[Candidate]:
        return [
            Candidate(
                op.id, op.tenant_id, op.run_id, op.kind, op.seq_id, op.cost_tokens,
                attempts=max(SUSPECT * (op.id in suspects), self._deaths.get(op.id, 0)),
                is_replay=True, is_resident=self._engine.has_run(run_id),
            )
            for run_id, held in self._replaying.items()
            for op in held.replays.values()
        ]  # fmt: skip

    def replayed_op(self, run_id: RunId, seq_id: int) -> OpRow:
        return self._held[run_id].replays[seq_id]

    def _restore(self, held: HeldRun) -> bool:
        """Bring the run's snapshot into the engine if it isn't there. False: nothing is on disk to start from."""
        run_id = held.row.run_id
        if not self._engine.has_run(run_id):
            if held.snapshot is None:
                return False
            self._engine.import_run(held.row.spec, self._ahead.take(held.snapshot), may_keep=True)
            self._idle.pop(run_id, None)
            crash_point("run.after_restore")
            log.debug(
                "run restored",
                run_id=run_id,
                tenant_id=held.row.tenant_id,
                snapshot_seq=held.snapshot_seq,
                replays=len(held.replays),
            )
        self.residency.used(held)
        return True

    def need(self, run_id: RunId | None) -> HeldRun:
        """The run, in the engine.

        Raises:
            UserError: it was never created.
            CorruptError: it was given up.
            NoMemoryError: there is no memory for its state now.
        """
        if run_id is None:
            raise UserError("this request needs a run")
        held = self._held[run_id]
        try:
            is_there = held.given_up is None and self._restore(held)
        except NoMemoryError:
            raise
        except TinsmithError as error:
            what = "is gone" if isinstance(error, NotFoundError) else "is damaged"
            tenant_id = held.row.tenant_id
            log.error(
                "snapshot unreadable", run_id=run_id, tenant_id=tenant_id, snapshot=held.snapshot, error=str(error)
            )
            self._give_up(held, f"its snapshot up to request {held.snapshot_seq} {what}")
        if held.given_up is not None:
            raise CorruptError(held.given_up.message)
        if not is_there:
            raise UserError(f"the run {run_id} was not created: look at the error of its create request")
        return held

    def given_up(self, run_id: RunId | None) -> Failure | None:
        """Why the run was given up; None for a good one."""
        held = self._held.get(run_id) if run_id else None
        return None if held is None else held.given_up

    def as_it_stands(self, outcome: Outcome) -> Outcome:
        """The outcome, or a failure if its run was given up meanwhile."""
        failure = self.given_up(outcome.op.run_id)
        return outcome if failure is None else failed(outcome.op, failure)

    def replay_failed(self, op: OpRow, failure: Failure) -> bool:
        """A finished op of the run's log fails now that it is computed again: what would follow isn't its state.

        Returns:
            True if memory was lacking: the run waits, and has to be forgotten. For anything else it is given up.
        """
        held = self._held.get(op.run_id) if op.run_id else None
        if held is None or held.given_up is not None:
            return False
        if failure.code in LACKS:
            self.postponed.add(held.row.run_id, op, failure)
            return True
        log.error("replay failed", **about([op]), error=failure.message)
        self._give_up(held, f"request {op.seq_id} of its log can't be computed again")
        return False

    def _give_up(self, held: HeldRun, why: str) -> None:
        run_id = held.row.run_id
        message = (
            f"the state of the run {run_id} is lost: {why}. Restore the data directory from a backup and start the "
            "server again, or make a new run from the last checkpoint"
        )
        log.error("run given up", run_id=run_id, tenant_id=held.row.tenant_id, why=why)
        series.CORRUPTED.add()
        held.given_up = CorruptError(message).as_failure()
        held.replays.clear()
        self._replaying.pop(run_id, None)
        self.postponed.forget(run_id)
        self.residency.drop(run_id)
        self._idle[run_id] = held
        self._set_status(held, RunStatus.CORRUPTED)

    def _set_status(self, held: HeldRun, status: RunStatus) -> None:
        self._recorder.flush()
        self._store.runs.set_status(self._me, held.row.run_id, status)
        held.row = replace(held.row, status=status)

    def applied(self, op: OpRow, seconds: float) -> None:
        """The op has been computed (again or for the first time) and, unless it is a replay, handed to the recorder."""
        held = self._held.get(op.run_id) if op.run_id else None
        if held is None or held.given_up is not None:
            return
        if held.replays.pop(op.seq_id, None) is not None:
            series.REPLAYED.add(op.kind)
        if not held.replays:
            self._replaying.pop(held.row.run_id, None)
            self.postponed.forget(held.row.run_id)
        if self._engine.has_run(held.row.run_id):
            self._idle.pop(held.row.run_id, None)
            self.residency.used(held)
        if held.row.status is RunStatus.CORRUPTED and not held.replays:
            self._set_status(held, RunStatus.READY)
        held.applied_seq = max(held.applied_seq, op.seq_id)
        if op.kind.has_effect:
            reads_a_file = op.meta.get("blob") is not None  # which stays until a snapshot covers the op
            held.debt_bytes += op.payload_bytes + reads_a_file
            held.debt_s += seconds
            held.debt_ops += 1
            self._in_debt[held.row.run_id] = held

    def forget(self, run_ids: Iterable[RunId]) -> None:
        """Drop the runs' tensors and read their logs again: after an error that may have left them half changed."""
        self._writer.flush()
        self._recorder.flush()
        for run_id in set(run_ids):
            self.residency.drop(run_id)
            held = self._held[run_id]
            if held.given_up is None:
                self._adopt(self._store.runs.get_held(self._me, run_id))

    def snapshot_due(self) -> None:
        """Start a snapshot of each run whose debt has grown past the settings."""
        for run_id, held in list(self._in_debt.items()):
            if not self._snapshots.is_over(held, len(self.residency)) or held.given_up is not None:
                del self._in_debt[run_id]
            elif self._snapshots.may_copy(held):
                self._snapshots.start(held)

    def snapshot_all(self) -> None:
        """Start a snapshot of every run that has any debt: before a clean stop."""
        for held in self._held.values():
            if held.debt_bytes and self._snapshots.can_start(held):
                self._snapshots.start(held, is_still=True)
                self._writer.flush()

    def evict(self, busy: AbstractSet[RunId], computing: AbstractSet[RunId]) -> bool:
        """Let runs leave memory (see `Residency.make_room`), and give back those that have long been idle, or whose
        session has ended.

        Returns:
            Whether there is room now for others that wait, or any was given back, which is to be leased again if there
            is work for it.
        """
        num_held, num_resident = len(self._held), len(self.residency)
        self.residency.make_room(busy, computing)
        if len(self._idle) > MAX_IDLE:
            longest = [run_id for run_id in self._idle if run_id not in busy][: MAX_IDLE // 4]
            self._release(longest)
        self._release(self.residency.ended_idle(self._idle.keys(), busy))
        has_room = self.residency.num_coming > 0 and len(self.residency) < num_resident
        return has_room or len(self._held) < num_held

    def give(self, waiting: AbstractSet[RunId], computing: AbstractSet[RunId]) -> None:
        """Let runs go that wait here while another worker has nothing to do. waiting: those with queued requests."""
        may_go = [
            run_id
            for run_id in waiting - computing - self._giving
            if run_id in self._held and self._held[run_id].given_up is None and not self._held[run_id].replays
        ]
        since = {run_id: self._held[run_id].held_since for run_id in may_go}
        for run_id in self.rebalancing.choose(may_go, since):
            log.info("run given to another worker", run_id=run_id, tenant_id=self._held[run_id].row.tenant_id)
            crash_point("give.after_choice")
            if run_id in self._idle:
                self._give_back(run_id)
            else:
                self._giving.add(run_id)
                self.residency.send_away(self._held[run_id])
        self._giving &= self.residency.leaving

    def _let_go(self, held: HeldRun) -> None:
        """A run has left memory. One whose file lacks something (no payload, so quickly done) is read anew."""
        run_id = held.row.run_id
        self._in_debt.pop(run_id, None)
        crash_point("run.after_eviction")
        if run_id in self._giving:
            self._giving.discard(run_id)
            self._give_back(run_id)
        elif held.debt_ops:
            self._release([run_id])
        else:
            self._idle[run_id] = held

    def _give_back(self, run_id: RunId) -> None:
        """A run that is given to another worker, and whose state is on disk."""
        crash_point("give.on_disk")
        self._release([run_id])
        crash_point("give.after_release")

    def _release(self, run_ids: Sequence[RunId]) -> None:
        if not run_ids:
            return
        for run_id in run_ids:
            self._idle.pop(run_id, None)
            self.postponed.forget(run_id)
            del self._held[run_id]
        self._recorder.flush()
        self._store.runs.release(self._me, run_ids)

    def _on_disk(self, key: BlobKey, state: RunState) -> None:
        if not self._engine.is_on_host:
            self._ahead.keep(key, state)

    def release_all(self) -> None:
        self._recorder.flush()
        crash_point("run.before_release")
        self._store.runs.release(self._me, list(self._held))
        self._held.clear()
        self._idle.clear()

    def _adopt(self, row: RunRow) -> None:
        try:
            self._store.runs.check(row)
        except CorruptError as error:
            self._hold(HeldRun.lost(row))
            self._give_up(self._held[row.run_id], error.message)
            return
        try:
            self._hold(HeldRun.of(row, self._store.ops.replayable))
        except CorruptError as error:
            if not self._fall_back(HeldRun.lost(row), error):
                self._hold(HeldRun.lost(row))
                self._give_up(self._held[row.run_id], error.message)

    def _hold(self, held: HeldRun) -> None:
        run_id = held.row.run_id
        self._held[run_id] = self._idle[run_id] = held
        self._replaying.pop(run_id, None)
        self._in_debt.pop(run_id, None)
        killer = next((op for op in held.replays.values() if self._deaths.get(op.id, 0) >= MAX_REPLAY_DEATHS), None)
        if killer is not None:
            why = f"request {killer.seq_id} of its log ended {MAX_REPLAY_DEATHS} workers that computed it again"
            self._give_up(held, why)
            return
        if held.replays:
            self._replaying[run_id] = held
            log.info(
                "run to be replayed",
                run_id=run_id,
                tenant_id=held.row.tenant_id,
                above=held.snapshot_seq,
                ops=len(held.replays),
            )

    def _fall_back(self, held: HeldRun, trouble: TinsmithError) -> bool:
        """The newest snapshot is damaged or gone: go on from the one before it, and its log. False: there is none."""
        row = held.row
        if held.is_fallen_back or not row.has_previous:
            return False
        try:
            spare = HeldRun.fallen_back(row, self._store.ops.replayable)
        except CorruptError:
            return False
        log.error(
            "snapshot damaged; the run goes on from the one before it",
            run_id=row.run_id, tenant_id=row.tenant_id, snapshot=row.snapshot_blob, error=trouble.message,
            previous=row.previous_blob, above=row.previous_seq, replays=len(spare.replays),
        )  # fmt: skip
        series.DAMAGED.add()
        if held.snapshot is not None:
            self._ahead.drop(held.snapshot)
        self._hold(spare)
        crash_point("run.after_fallback")
        return True
