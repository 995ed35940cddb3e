"""What do quotas cost a request? CPU time of a request's way through the store and the worker's look, with and without.

    python benchmarks/quotas.py

Samples that are recorded, seen, claimed eight at a time and recorded as done with their usage, on a store without
fsync. The arms are tenants of one store and take turns: one whom no quota concerns, one with three quotas that hold
nobody back, and the first again while 2,000 requests of a third are held back. `bare` leaves the tallies out, which are
written for every tenant.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import rows

from tinsmith.store import Store, ledger, open_store
from tinsmith.store.quota_rules import Quota
from tinsmith.store.rows import Finished, NewOp, NewSampler, WorkerId
from tinsmith.store.usage_rows import Usage
from tinsmith.types import OpId, OpKind, OpState, Role, SamplerId, TenantId
from tinsmith.worker.queue_view import QueueView

BASE = "base"
BATCH = 8
NUM_OPS = 240
REPEATS = 9
NUM_HELD = 2000
PLENTY = {Quota.REQUESTS: 10**6, Quota.TOKENS_PER_DAY: 10**15, Quota.QUEUED_TOKENS: 10**9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_flag(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = open_store(Path(directory), synchronous="NORMAL")
        worker = store.workers.register("w0", BASE, 3600.0, time.time())
        free, bound, held = (_Tenant(store, name) for name in ("free", "bound", "held"))
        store.quotas.put(bound.tenant, None, PLENTY, time.time())
        view = QueueView(worker, BASE, store, 3600.0, Role.ALL)
        view.look()
        arms: dict[str, Callable[[], float]] = {
            "bare": lambda: _bare(free, worker, view),
            "no quota": lambda: free.work(worker, view),
            "three quotas": lambda: bound.work(worker, view),
        }
        times = _measure(arms)
        store.quotas.put(held.tenant, None, {Quota.TOKENS_PER_DAY: 0}, time.time())
        held.ask(NUM_HELD)
        view.look()
        times |= _measure({"beside many that are held": lambda: free.work(worker, view)})
        bare = statistics.median(times["bare"])
        print(f"CPU time a request, median of {REPEATS}: recorded, looked at, claimed, recorded as done")
        for name, found in times.items():
            median = statistics.median(found)
            print(f"  {name:26} {median * 1e6:7.0f} us, {median / bare:.2f} x bare")
        made = [
            rows.Row(what, _ratio(times, above, below), "x", "", REPEATS)
            for what, above, below in (
                ("a request with three quotas / without", "three quotas", "no quota"),
                ("a request with the tallies of quotas / without", "no quota", "bare"),
                ("a request beside 2,000 that are held back / without", "beside many that are held", "no quota"),
            )
        ]
        rows.save(args.rows, made)
        store.close()


class _Tenant:
    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.tenant: TenantId = store.tenants.create(name).tenant_id
        session = store.sessions.create(self.tenant).session_id
        self._sampler = SamplerId(f"{session}:sample:0")
        store.samplers.create(NewSampler(self.tenant, session, self._sampler, BASE), time.time())
        self._num = 0

    def ask(self, count: int) -> list[OpId]:
        return [self._store.ops.enqueue(self._op(), time.time()).row.id for _ in range(count)]

    def work(self, worker: WorkerId, view: QueueView) -> float:
        """CPU seconds a request."""
        started = time.process_time()
        for _ in range(NUM_OPS // BATCH):
            op_ids = self.ask(BATCH)
            view.look()
            offered = {op.id for op in view.ops}
            claimed = self._store.ops.claim(worker, [op_id for op_id in op_ids if op_id in offered], time.time())
            view.remove(op.id for op in claimed)
            done = [
                Finished(op.id, OpState.DONE, result=b"r", result_bytes=1, usage=Usage(0, 100, 0, 100))
                for op in claimed
            ]
            self._store.ops.finish(worker, done, time.time())
            if len(done) != BATCH:
                raise RuntimeError(f"{len(done)} of {BATCH} were let through")
        return (time.process_time() - started) / NUM_OPS

    def _op(self) -> NewOp:
        self._num += 1
        return NewOp(
            tenant_id=self.tenant,
            kind=OpKind.SAMPLE,
            base_model=BASE,
            id=OpId(f"req-{uuid.uuid4().hex}"),
            seq_id=self._num,
            sampler_id=self._sampler,
            cost_tokens=200,
            payload=b"p" * 200,
            payload_bytes=200,
        )


def _bare(tenant: _Tenant, worker: WorkerId, view: QueueView) -> float:
    """Without what is written to the tallies."""
    tallies = ledger._TALLY
    ledger._TALLY = dict.fromkeys(tallies, _Nothing())  # type: ignore[assignment]
    try:
        return tenant.work(worker, view)
    finally:
        ledger._TALLY = tallies


class _Nothing:
    def run_many(self, *_: object) -> None:
        pass


def _measure(arms: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(REPEATS):
        for name, work in arms.items():
            times[name].append(work())
    return times


def _ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(times[above]) / statistics.median(times[below])


if __name__ == "__main__":
    main()
