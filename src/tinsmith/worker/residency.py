"""Which of the held runs are in the engine's memory: who comes in, who leaves, least recently used first.

Owns the bound on their number and bytes; the states of those to come are read beside the loop, and those who leave are
written beside it. What stays true: the runs in the engine stay within both bounds (a single run may be larger), and no
request of a run is begun while it is on its way out, so that its state is written without a copy.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from tinsmith.config import Settings
from tinsmith.engine import Engine
from tinsmith.errors import TinsmithError
from tinsmith.fair_queueing import Standing
from tinsmith.scheduler import Candidate, newcomers
from tinsmith.types import RunId
from tinsmith.worker.held import HeldRun
from tinsmith.worker.memory import FreeMemory
from tinsmith.worker.readahead import ReadAhead
from tinsmith.worker.snapshots import Snapshots

MAX_NEW_RUNS = 8  # brought into memory by one batch
READ_AHEAD_RUNS = 16  # whose states are looked for before there is room for them
MAX_LEAVING = 4  # states that wait to be written, when runs leave memory
MIN_STAY_S = 1.0  # a run that has work stays so long after it was used, though others wait for its place
TURN_S = 5.0  # but once others have waited so long, one that has been here as long goes, however busy it is
ENDED_CHECK_S = 5.0  # between two looks for runs of sessions that have ended
IDLE_CHECK_S = 30.0  # the same of runs that are not in memory
RETRY_S = 1.0  # after a state could not be written


class Residency:
    def __init__(
        self,
        engine: Engine,
        snapshots: Snapshots,
        ahead: ReadAhead,
        settings: Settings,
        let_go: Callable[[HeldRun], None],
        go_without: Callable[[HeldRun, TinsmithError], bool],
        ended_among: Callable[[Collection[RunId]], AbstractSet[RunId]],
        gone_among: Callable[[Collection[RunId]], AbstractSet[RunId]],
    ) -> None:
        """`let_go` is told of each run that has left. `go_without`: a run's snapshot can't be read; whether the run has
        taken another way, for which it has to be looked at anew. `ended_among` tells of which runs the sessions have
        ended, or that were let go; `gone_among` of the latter alone."""
        self._engine = engine
        self._snapshots = snapshots
        self._ahead = ahead
        self._max_runs = settings.max_resident_runs
        self._max_bytes = settings.resident_runs_mib * 2**20
        self._let_go = let_go
        self._go_without = go_without
        self._memory = FreeMemory()
        self._resident: OrderedDict[RunId, HeldRun] = OrderedDict()  # the longest unused first
        self._came_at: dict[RunId, float] = {}  # of the resident ones
        self._waits_since: dict[RunId, float] = {}  # of those with work that there is no room for
        self._leaving: dict[RunId, bool] = {}  # whether it leaves although it has work
        self.num_coming = 0  # runs with work whose state is being read, or for which there is no room
        self._num_waiting = 0  # runs with work that there is no room for
        self._bytes_waiting = 0
        self._not_before = 0.0
        self._ended_among = ended_among
        self._gone_among = gone_among
        self._asked_at = self._asked_idle_at = float("-inf")

    def __len__(self) -> int:
        return len(self._resident)

    def used(self, held: HeldRun) -> None:
        """Its state is in the engine, and was just looked at or changed."""
        held.used_at = time.monotonic()
        self._came_at.setdefault(held.row.run_id, held.used_at)
        self._resident[held.row.run_id] = held
        self._resident.move_to_end(held.row.run_id)

    def drop(self, run_id: RunId) -> None:
        """Forget its tensors, whatever they are worth."""
        self._engine.drop_run(run_id)
        self._resident.pop(run_id, None)
        self._came_at.pop(run_id, None)
        self._leaving.pop(run_id, None)

    def choose(
        self, candidates: Sequence[Candidate], held: Mapping[RunId, HeldRun], trained: Standing
    ) -> list[Candidate]:
        """The candidates that may be planned: of runs in memory, and of some that can come in now.

        The others wait: for their state, which is being read, for room, or for their run's way out to end.
        """
        absent = [c for c in candidates if c.run_id is not None and not c.is_resident]
        coming = {c.run_id for c in absent if c.run_id is not None and held[c.run_id].given_up is not None}
        self._num_waiting = self._bytes_waiting = 0
        room, room_bytes = self._max_runs - len(self._resident), self._max_bytes - self._engine.runs_bytes
        waiting = [c for c in absent if c.run_id not in coming]
        self.num_coming = 0
        waits_since: dict[RunId, float] = {}
        for run_id in newcomers(waiting, READ_AHEAD_RUNS, trained):
            run = held[run_id]
            is_ready = run.snapshot is None or self._ahead.want(run.snapshot)
            trouble = self._ahead.trouble(run.snapshot) if is_ready and run.snapshot is not None else None
            if trouble is not None and self._go_without(run, trouble):
                is_ready = False
            size = self._engine.run_bytes(run.row.spec)
            fits = (room > 0 and size <= room_bytes) or (not self._resident and room == self._max_runs)
            room -= 1
            room_bytes -= size
            if not fits:
                waits_since[run_id] = self._waits_since.get(run_id, time.monotonic())
                self._num_waiting += 1
                self._bytes_waiting += size
            elif is_ready:
                coming.add(run_id)
            self.num_coming += run_id not in coming
        self._waits_since = waits_since
        return [
            c
            for c in candidates
            if c.run_id is None or (c.run_id not in self._leaving if c.is_resident else c.run_id in coming)
        ]

    def make_room(self, busy: AbstractSet[RunId], computing: AbstractSet[RunId]) -> None:
        """Let runs leave until both bounds hold and there is room for those that wait.

        busy: runs with work, which leave only for others that have waited; computing: runs that must stay.
        """
        self._end_leaving(busy)
        self._let_ended_go(busy)
        if self._num_over() <= 0 or time.monotonic() < self._not_before:
            return
        for held in list(self._resident.values()):
            if self._num_over() <= 0:
                return
            if held.row.run_id not in busy:
                self._leave(held, is_forced=False)
        if not self._num_waiting or self._leaving:
            return
        for held in self._in_turn():
            if held.row.run_id not in computing and self._leave(held, is_forced=True):
                return

    def _in_turn(self) -> list[HeldRun]:
        """Those that may be sent away though they have work, in that order: the longest unused, and where others have
        waited long, those that have been here longest."""
        now = time.monotonic()
        unused = [held for held in self._resident.values() if now - held.used_at >= MIN_STAY_S]
        if min(self._waits_since.values(), default=now) > now - TURN_S:
            return unused
        longest = sorted(self._resident, key=self._came_at.__getitem__)
        return unused + [self._resident[run_id] for run_id in longest if now - self._came_at[run_id] >= TURN_S]

    def _let_ended_go(self, busy: AbstractSet[RunId]) -> None:
        """Whose session has ended, and who has nothing left to do, keeps no place in memory. Of a run that was let go
        nothing is written any more, so it goes though the disk be full."""
        if not self._resident or time.monotonic() - self._asked_at < ENDED_CHECK_S:
            return
        self._asked_at = time.monotonic()
        ended = self._ended_among(self._resident.keys())
        gone = self._gone_among(ended) if ended else ended
        for run_id in ended:
            if run_id not in busy:
                self._leave(self._resident[run_id], is_forced=False, is_kept=run_id not in gone)

    @property
    def leaving(self) -> AbstractSet[RunId]:
        """Those on their way out."""
        return self._leaving.keys()

    def send_away(self, held: HeldRun) -> bool:
        """Begin the way out of a run that has work; it ends in `let_go`. False: it can't leave now."""
        return held.row.run_id in self._resident and self._leave(held, is_forced=True)

    def ended_idle(self, idle: Collection[RunId], busy: AbstractSet[RunId]) -> Sequence[RunId]:
        """Of runs that are held and not in memory those whose session has ended, and who have nothing left to do.
        Looked up every `IDLE_CHECK_S`."""
        if not idle or time.monotonic() - self._asked_idle_at < IDLE_CHECK_S:
            return ()
        self._asked_idle_at = time.monotonic()
        absent = [run_id for run_id in idle if run_id not in self._resident and run_id not in busy]
        return [run_id for run_id in self._ended_among(absent) if run_id not in busy]

    def _num_over(self) -> int:
        """How many runs must leave, as far as can be said; those on their way out count as gone."""
        left = len(self._resident) - len(self._leaving)
        over = left + min(self._num_waiting, MAX_NEW_RUNS) - self._max_runs
        leaving = sum(self._engine.run_bytes(self._resident[run_id].row.spec) for run_id in self._leaving)
        is_heavy = self._engine.runs_bytes - leaving + self._bytes_waiting > self._max_bytes
        return max(over, int(is_heavy and left > 0))

    def _leave(self, held: HeldRun, *, is_forced: bool, is_kept: bool = True) -> bool:
        """Begin a run's way out; at once, if nothing of it has to be written. False: it can't leave now.

        is_kept: its state is wanted again.
        """
        run_id = held.row.run_id
        if run_id in self._leaving or held.num_saves or held.is_snapshotting or held.replays:
            return False
        if is_kept and held.given_up is None and held.debt_bytes:  # without any, it is made again as fast as it is read
            if len(self._leaving) >= MAX_LEAVING or not self._snapshots.can_start(held):
                return False
            self._leaving[run_id] = is_forced
            self._snapshots.start(held, is_still=True)
            return True
        self._go(held)
        return True

    def _end_leaving(self, busy: AbstractSet[RunId]) -> None:
        """Those whose state is on disk by now are gone; one that got work meanwhile stays, unless others wait."""
        for run_id, is_forced in list(self._leaving.items()):
            held = self._resident[run_id]
            if held.is_snapshotting:
                continue
            del self._leaving[run_id]
            if held.debt_bytes:
                self._not_before = time.monotonic() + RETRY_S
            elif is_forced or run_id not in busy:
                self._go(held)

    def _go(self, held: HeldRun) -> None:
        self.drop(held.row.run_id)
        self._memory.freed()
        self._let_go(held)
