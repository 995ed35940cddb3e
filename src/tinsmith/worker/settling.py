"""What becomes of ops once they are computed, or once that failed: recorded, tried again one by one, or put back.

What stays true: an outcome is handed to the recorder before its run counts as changed by it, a replay's outcome is
dropped, and after an error that nobody foresaw no op is lost: each fails alone or is queued again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinsmith.errors import NoMemoryError
from tinsmith.store.rows import OpRow
from tinsmith.types import Failure, OpId, RunId
from tinsmith.worker.claims import Claims
from tinsmith.worker.outcomes import INTERNAL, Outcome, failed
from tinsmith.worker.postponed import TOO_LONG
from tinsmith.worker.queue_view import QueueView
from tinsmith.worker.recorder import Recorder
from tinsmith.worker.runs import HeldRuns
from tinsmith.worker.suspects import Suspects

NO_MEMORY = NoMemoryError(
    "there is no memory at the moment for this request; it had no effect: send it again later, or in smaller parts"
)


class Settling:
    def __init__(
        self,
        runs: HeldRuns,
        claims: Claims,
        queue: QueueView,
        recorder: Recorder,
        suspects: Suspects,
        has_more: Callable[[], bool],
        go_on: Callable[[bool], None],
    ) -> None:
        """`has_more`: something else is computed or waits. `go_on` has the loop plan again; with True, look before."""
        self._runs = runs
        self._claims = claims
        self._queue = queue
        self._recorder = recorder
        self._suspects = suspects
        self._has_more = has_more
        self._go_on = go_on
        self._saving: set[OpId] = set()  # saves whose outcome comes once their file is on disk

    def begin_saves(self, ops: Sequence[OpRow]) -> None:
        self._saving |= {op.id for op in ops if op.kind.is_save}

    def end_saves(self, outcomes: Sequence[Outcome]) -> None:
        self._saving -= {outcome.op.id for outcome in outcomes}

    def settle(self, outcomes: Sequence[Outcome], replays: set[OpId], seconds: float) -> None:
        """Have the new outcomes recorded, then count what was applied to each run.

        A replay that fails where its first run didn't leaves a state that the log doesn't describe: the run is given
        up, and what was computed on it together with the replay fails too. One for which there was no memory is
        computed again later, and all of its run with it.
        """
        short: set[RunId | None] = set()
        for outcome in outcomes:
            failure = outcome.finished.failure
            if outcome.op.id in replays and failure is not None and self._runs.replay_failed(outcome.op, failure):
                short.add(outcome.op.run_id)
        self._claims.replayed([outcome.op for outcome in outcomes if outcome.op.id in replays])
        if short:
            self._put_back([outcome.op for outcome in outcomes if outcome.op.run_id in short], replays)
            outcomes = [outcome for outcome in outcomes if outcome.op.run_id not in short]
        self.commit([self._runs.as_it_stands(o) for o in outcomes if o.op.id not in replays])
        for outcome in outcomes:
            self._runs.applied(outcome.op, seconds)
            self._suspects.discard(outcome.op.id)

    def settle_save(self, outcome: Outcome) -> None:
        self._saving.discard(outcome.op.id)
        self.settle([outcome], set(), 0.0)

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Have outcomes recorded."""
        if outcomes:
            self._recorder.record(outcomes, at_once=not self._has_more())
            self._go_on(False)

    def contain(self, ops: Sequence[OpRow], replays: set[OpId], error: Exception) -> None:
        """After an unforeseen error: a lone op fails (a lone replay costs its run, unless memory was lacking), several
        are tried again one by one; their runs are read anew."""
        failure = _failure_of(error)
        new = [op for op in ops if op.id not in replays and op.id not in self._saving]
        self._claims.replayed([op for op in ops if op.id in replays])
        if len(ops) == 1:
            self.commit([failed(op, failure) for op in new])
            for op in ops:
                if op.id in replays and self._runs.replay_failed(op, failure):
                    self._put_back([op], replays)
        else:
            self.unclaim([op.id for op in new])
            self._suspects |= {op.id for op in ops}
        self._runs.forget(op.run_id for op in ops if op.run_id is not None)
        self._go_on(True)

    def unclaim(self, op_ids: Sequence[OpId]) -> None:
        """They are queued again."""
        self._claims.give_back(op_ids)
        self._go_on(True)

    def _put_back(self, ops: Sequence[OpRow], replays: set[OpId]) -> None:
        """Their runs wait for memory: what was computed of them is forgotten. After long their requests fail."""
        self.unclaim([op.id for op in ops if op.id not in replays])
        run_ids = {op.run_id for op in ops if op.run_id is not None}
        self._runs.forget(run_ids)
        self._queue.look()
        told = [op.id for op in self._queue.ops if op.run_id in run_ids and self._runs.postponed.is_long(op.run_id)]
        if told:
            self.commit([failed(op, TOO_LONG) for op in self._claims.take_queued(told)])


def _failure_of(error: Exception) -> Failure:
    if isinstance(error, MemoryError):  # of the process, outside of the engine: it says as little about the request
        error = NO_MEMORY
    return error.as_failure() if isinstance(error, NoMemoryError) else INTERNAL
