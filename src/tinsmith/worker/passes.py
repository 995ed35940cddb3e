"""Training passes under way. Each is computed pack by pack, and they take turns: a long one keeps nobody waiting.

A tenant has one pass at a time, so what it sends meanwhile goes together into its next one. The pass of the tenants
that had the least time for their weight goes first; who comes, or comes back, starts level with the least served of
those at work, at the latest when a fluid server would begin it (`fair_queueing.Fluid`).
Nothing of a pass takes effect before all of it is computed, so it doesn't matter to a run what was computed in between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tinsmith.crashpoints import crash_point
from tinsmith.engine import Engine, TrainingPass
from tinsmith.errors import TinsmithError
from tinsmith.fair_queueing import Fluid
from tinsmith.observe import series, tracing
from tinsmith.scheduler import Candidate
from tinsmith.store.rows import OpRow
from tinsmith.store.usage_rows import Usage
from tinsmith.types import Failure, OpId, RunId, TenantId, TrainItem
from tinsmith.wire.media import PROTOBUF
from tinsmith.wire.training import encode_train_result
from tinsmith.worker.accounts import Accounts
from tinsmith.worker.decode import Payloads
from tinsmith.worker.decode_ahead import DecodeAhead
from tinsmith.worker.outcomes import Outcome, computed, failed
from tinsmith.worker.runs import HeldRuns
from tinsmith.worker.tempo import Tempo

MAX_OPEN = 16  # each holds a copy of its runs' gradients
MIN_PACK_WORK = 64
IDLE_PACK_S = 1.0  # whatever arrives during a long pass waits no longer than this


@dataclass(slots=True, eq=False)
class OpenPass:
    """ops: all that it was begun for; ready: those of them that are computed; refused: the outcomes of the others.

    is_suspect: nothing may be computed beside it. seconds: of computing, so far. speed: work a second, 0: not known.
    """

    ops: Sequence[OpRow]
    replays: set[OpId]
    ready: list[tuple[OpRow, TrainItem]]
    refused: list[Outcome]
    training: TrainingPass
    is_suspect: bool = False
    seconds: float = 0.0
    speed: float = 0.0
    began_at: float = field(default_factory=time.time)

    @property
    def tenants(self) -> frozenset[TenantId]:
        return frozenset(op.tenant_id for op in self.ops)

    def advance(self, max_work: int) -> bool:
        """Compute a pack. False if none is left after it."""
        started = time.perf_counter()
        stats = self.training.advance(max_work)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        crash_point("pass.after_pack")
        if stats is not None and stats.work >= MIN_PACK_WORK:
            speed = stats.work / max(seconds, 1e-6)
            self.speed = speed if not self.speed else 0.7 * self.speed + 0.3 * speed
        return stats is not None and not self.training.is_computed

    def count(self) -> None:
        """Tell of it, once it has ended."""
        counts = {
            "runs": len({item.run_id for _, item in self.ready}),
            "tenants": len({op.tenant_id for op, _ in self.ready}),
            "tokens": sum(item.num_tokens for _, item in self.ready),
        }
        series.PASS_SECONDS.observe(self.seconds)
        series.PASS_RUNS.observe(counts["runs"])
        series.PASS_TENANTS.observe(counts["tenants"])
        series.PASS_TOKENS.observe(counts["tokens"])
        tracing.computed([op for op in self.ops if op.id not in self.replays], self.began_at, time.time(), counts)

    def commit(self) -> list[Outcome]:
        """The outcomes of all its ops, once all is computed."""
        started = time.perf_counter()
        results = self.training.commit()
        crash_point("pass.after_merge")
        self.seconds += time.perf_counter() - started
        outcomes = list(self.refused)
        for (op, item), result in zip(self.ready, results, strict=True):
            if isinstance(result, Failure):
                outcomes.append(failed(op, result))
            else:
                usage = Usage(trained_tokens=item.num_tokens)
                num_bytes = sum(logprobs.nbytes for logprobs in result.logprobs)
                outcomes.append(computed(op, partial(encode_train_result, result), num_bytes, PROTOBUF, usage))
        return outcomes


class Passes:
    def __init__(
        self,
        engine: Engine,
        payloads: Payloads,
        decoded: DecodeAhead,
        runs: HeldRuns,
        accounts: Accounts,
    ) -> None:
        """accounts: charged with the work of what begins."""
        self._engine = engine
        self._payloads = payloads
        self._decoded = decoded
        self._runs = runs
        self._accounts = accounts
        self._open: list[OpenPass] = []
        self._given: dict[TenantId, float] = {}  # seconds of computing, by weight
        self._now = 0.0  # what the least served had when it was looked last
        self._fluid: Fluid[TenantId] = Fluid()
        self._speed = 0.0
        self._tempo = Tempo()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_closed(self) -> bool:
        """Whether no pass may begin beside these."""
        return len(self._open) >= MAX_OPEN or any(one.is_suspect for one in self._open)

    @property
    def ops(self) -> list[OpRow]:
        return [op for one in self._open for op in one.ops]

    @property
    def tenants(self) -> frozenset[TenantId]:
        return frozenset(tenant for one in self._open for tenant in one.tenants)

    @property
    def runs(self) -> frozenset[RunId]:
        return frozenset(op.run_id for op in self.ops if op.run_id is not None)

    def begin(self, ops: Sequence[OpRow], replays: set[OpId], *, is_suspect: bool) -> None:
        """A pass over claimed ops, and over replays; those that can't be read fail with it. Each full run has one of
        its own, so that nobody waits for it, or is charged for its time.
        """
        refused: list[Outcome] = []
        ready: list[tuple[OpRow, TrainItem]] = []
        for op in ops:
            try:
                self._runs.need(op.run_id)
                ready.append((op, self._decoded.take(op) or self._payloads.train_item(op)))
            except TinsmithError as error:
                refused.append(failed(op, error.as_failure()))
                if op.id in replays:
                    self._runs.replay_failed(op, error.as_failure())
        ready = [(op, item) for op, item in ready if self._runs.given_up(op.run_id) is None]
        for op, item in ready:
            self._accounts.charge_pass(op, item.work)
        self._note_begin([(op, item) for op, item in ready if op.id not in replays])
        lost = [op for op in ops if op.id not in {op.id for op, _ in ready}]
        begun: list[OpenPass] = []
        for own in self._apart(ready) or [[]]:
            of_it = [op for op, _ in own] + (lost if not begun else [])
            training = self._engine.start_pass([item for _, item in own])
            told = refused if not begun else []
            begun.append(OpenPass(of_it, replays, own, told, training, is_suspect, speed=self._speed))
        for one in begun:
            level = min(map(self._had, self._open), default=self._now)
            for tenant in one.tenants:
                self._given[tenant] = max(self._given.get(tenant, 0.0), level)
            self._open.insert(0, one)
            weights = {tenant: self._accounts.weight(tenant) for tenant in self.tenants}
            self._fluid.enter(one.tenants, self.tenants, weights)

    def _apart(self, ready: Sequence[tuple[OpRow, TrainItem]]) -> list[list[tuple[OpRow, TrainItem]]]:
        """Those of adapters together, those of each full run by themselves."""
        groups: dict[RunId | None, list[tuple[OpRow, TrainItem]]] = {}
        for op, item in ready:
            is_full = self._runs[item.run_id].row.spec.is_full
            groups.setdefault(item.run_id if is_full else None, []).append((op, item))
        return list(groups.values())

    def _note_begin(self, ready: Sequence[tuple[OpRow, TrainItem]]) -> None:
        now = time.time()
        by_run: dict[RunId, list[tuple[OpRow, TrainItem]]] = {}
        for op, item in ready:
            by_run.setdefault(item.run_id, []).append((op, item))
        for run_id, own in by_run.items():
            self._tempo.begun(run_id, sum(item.work for _, item in own), min(op.created_at for op, _ in own), now)

    def beside(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those that may begin while these are under way: samples, and other tenants' requests, but no suspects."""
        if not self._open:
            return candidates
        if any(c.is_suspect and c.run_id is None for c in candidates):
            return []
        is_closed = self.is_closed or any(c.is_suspect for c in candidates)
        busy = self.tenants
        return [c for c in candidates if c.run_id is None or not (is_closed or c.tenant_id in busy)]

    def next(self) -> OpenPass | None:
        """The one whose turn it is: of those not begun that are due the oldest, else the least served; of equals, the
        newest."""
        if not self._open:
            return None
        level = min(map(self._had, self._open))
        due = [one for one in self._open if not one.seconds and any(map(self._fluid.is_due, one.tenants))]
        if due:
            chosen = due[-1]
            self._given |= {tenant: min(self._given[tenant], level) for tenant in chosen.tenants}
        else:
            chosen = min(self._open, key=self._had)
        self._now = max(self._now, level)
        return chosen

    def spent(self, one: OpenPass, seconds: float) -> None:
        """It was computed for so long; its tenants share in that by their work in it."""
        work = dict.fromkeys(one.tenants, 1)
        for op, item in one.ready:
            work[op.tenant_id] += item.work
        for tenant, own in work.items():
            amount, weight = seconds * own / sum(work.values()), self._accounts.weight(tenant)
            self._given[tenant] += amount / weight
            self._fluid.charge(tenant, amount, weight)

    def _had(self, one: OpenPass) -> float:
        return min(self._given[tenant] for tenant in one.tenants)

    def end(self, one: OpenPass) -> None:
        """It is computed, or it failed."""
        if one in self._open:
            self._open.remove(one)
            one.count()
            self._speed = one.speed
            now = time.time()
            for _, item in one.ready:
                self._tempo.ended(item.run_id, now)
            if not self._open:
                self._fluid.rest()

    def pass_work(self) -> int:
        """What a new pass may take in: the engine's budget, or less where that keeps the engine busy (`Tempo`)."""
        most = self._tempo.most_work(self._speed, time.time())
        return self._engine.pass_max_tokens if most is None else min(most, self._engine.pass_max_tokens)

    def pack_work(self, one: OpenPass, cap_s: float) -> int:
        """A pack's bound: the engine's budget, and what can be computed until others should get their turn."""
        budget = self._engine.pass_max_tokens
        if not one.speed:
            return budget
        seconds = min(cap_s, IDLE_PACK_S / len(self._open))
        return min(budget, max(MIN_PACK_WORK, int(one.speed * seconds)))
