"""What does the store cost a request? CPU and wall time of enqueue, claim and finish, alone and in batches.

    python benchmarks/store_ops.py [--synchronous FULL] [--directory DIR]

One run, payloads of 2000 bytes and results of 1000, both inline. CPU is split into user time (ours) and system time
(the kernel's, mostly fsync); the directory decides which disk is measured.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import rows

from tinsmith.store import Store, open_store
from tinsmith.store.rows import Finished, NewOp, NewRun, WorkerId
from tinsmith.types import OpId, OpKind, OpState, RunId, RunSpec, TenantId

NUM_OPS = 1000
BATCH = 8
BASE = "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synchronous", default="FULL")
    parser.add_argument("--directory", default=None)
    rows.add_flag(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        store = open_store(Path(directory), synchronous=args.synchronous)
        tenant = store.tenants.create("bench").tenant_id
        session = store.sessions.create(tenant).session_id
        run = RunId(f"{session}:train:0")
        new_run = NewRun(tenant, session, 0, RunSpec(run, BASE))
        store.ops.create_run(new_run, _op(tenant, run, 0, OpKind.CREATE), time.time())
        worker = store.workers.register("w0", BASE, 3600.0, time.time())
        store.runs.lease(worker, BASE, 10)
        print(f"synchronous={args.synchronous}, {NUM_OPS} ops; per op: user ms, system ms, wall ms")
        ids: list[OpId] = []
        _measure("enqueue", lambda: ids.extend(_enqueue(store, tenant, run, 1)))
        rounds = 10
        started = time.perf_counter()
        for _ in range(rounds):
            store.waiting.all(worker, BASE, 4096)
        print(f"  runnable, {NUM_OPS} queued: {(time.perf_counter() - started) / rounds * 1e3:.1f} ms a call")
        _measure("claim, one by one", lambda: [store.ops.claim(worker, [i], time.time()) for i in ids])
        _measure("finish, one by one", lambda: [_finish(store, worker, [i]) for i in ids])
        more = _enqueue(store, tenant, run, NUM_OPS + 1)
        batches = [more[i : i + BATCH] for i in range(0, NUM_OPS, BATCH)]
        _measure(f"claim, {BATCH} at once", lambda: [store.ops.claim(worker, b, time.time()) for b in batches])
        _measure(f"finish, {BATCH} at once", lambda: [_finish(store, worker, b) for b in batches])
        _measure("get", lambda: [store.ops.get(tenant, i) for i in ids])
        store.close()


def _op(tenant: TenantId, run: RunId, seq: int, kind: OpKind = OpKind.FORWARD_BACKWARD) -> NewOp:
    return NewOp(
        tenant_id=tenant,
        kind=kind,
        base_model=BASE,
        id=OpId(f"req-{uuid.uuid4().hex}"),
        seq_id=seq,
        run_id=run,
        payload=b"p" * 2000,
        payload_bytes=2000,
    )


def _enqueue(store: Store, tenant: TenantId, run: RunId, first: int) -> list[OpId]:
    return [store.ops.enqueue(_op(tenant, run, first + n), time.time()).row.id for n in range(NUM_OPS)]


def _finish(store: Store, worker: WorkerId, ids: list[OpId]) -> list[OpId]:
    done = [Finished(op_id, OpState.DONE, result=b"r" * 1000, result_bytes=1000) for op_id in ids]
    return store.ops.finish(worker, done, time.time())


def _measure(label: str, work: Callable[[], object]) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(f"  {label:20} {user / NUM_OPS * 1e3:.3f}  {system / NUM_OPS * 1e3:.3f}  {wall / NUM_OPS * 1e3:.3f}")


if __name__ == "__main__":
    main()
