"""Fixtures of the unit tests: a store with a tenant, a session and a worker, and short ways to do common things."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tinsmith.store import Store, open_store
from tinsmith.store.rows import Enqueued, Finished, NewOp, NewRun, NewSampler, OpRow, RunRow, WorkerId
from tinsmith.types import (
    BlobKey,
    Failure,
    OpId,
    OpKind,
    OpState,
    RunId,
    RunSpec,
    SamplerId,
    SessionId,
    TenantId,
)

BASE = "tiny"
BAD = Failure("invalid_request", "user", "send something else")


@dataclass
class World:
    store: Store
    tenant: TenantId
    session: SessionId
    worker: WorkerId
    now: float = 1000.0
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def tick(self, seconds: float = 1.0) -> float:
        self.now += seconds
        return self.now

    def op(self, run: RunId | None, seq: int, kind: OpKind = OpKind.FORWARD_BACKWARD, **more: Any) -> NewOp:
        values: dict[str, Any] = {
            "tenant_id": self.tenant,
            "kind": kind,
            "base_model": BASE,
            "id": OpId(f"req-{next(self._ids)}"),
            "seq_id": seq,
            "run_id": run,
            "payload": b"p",
            "payload_bytes": 1,
        }
        return NewOp(**{**values, **more})

    def run(self, number: int = 0, **more: Any) -> RunId:
        run_id = RunId(f"{self.session}:train:{number}")
        self.create(number, **more)
        return run_id

    def create(self, number: int = 0, **more: Any) -> Enqueued:
        run_id = RunId(f"{self.session}:train:{number}")
        new = NewRun(self.tenant, self.session, number, RunSpec(run_id, BASE, rank=8), {"color": "red"})
        return self.store.ops.create_run(new, self.op(run_id, 0, OpKind.CREATE, **more), self.tick())

    def put(self, run: RunId, seq: int, kind: OpKind = OpKind.FORWARD_BACKWARD, **more: Any) -> Enqueued:
        return self.store.ops.enqueue(self.op(run, seq, kind, **more), self.tick())

    def sampler(self, number: int = 0, blob: BlobKey | None = None) -> SamplerId:
        sampler_id = SamplerId(f"{self.session}:sample:{number}")
        self.store.samplers.create(NewSampler(self.tenant, self.session, sampler_id, BASE, blob=blob), self.tick())
        return sampler_id

    def sample(self, sampler: SamplerId, seq: int, **more: Any) -> Enqueued:
        return self.store.ops.enqueue(self.op(None, seq, OpKind.SAMPLE, sampler_id=sampler, **more), self.tick())

    def lease(self, worker: WorkerId | None = None) -> list[RunRow]:
        return list(self.store.runs.lease(worker or self.worker, BASE, 100, self.now))

    def runnable(self, limit: int = 100) -> list[OpRow]:
        return self.store.waiting.all(self.worker, BASE, limit).ops

    def claim(self, *op_ids: OpId) -> list[OpRow]:
        return self.store.ops.claim(self.worker, op_ids, self.tick())

    def finish(self, *op_ids: OpId, worker: WorkerId | None = None, **more: Any) -> Sequence[OpId]:
        done = [Finished(op_id, OpState.DONE, result=b"r", result_bytes=1, **more) for op_id in op_ids]
        return self.store.ops.finish(worker or self.worker, done, self.tick())

    def fail(self, *op_ids: OpId) -> Sequence[OpId]:
        failed = [Finished(op_id, OpState.FAILED, failure=BAD) for op_id in op_ids]
        return self.store.ops.finish(self.worker, failed, self.tick())

    def work_off(self) -> list[OpId]:
        """Lease, claim and finish all that can be run; the ids in order."""
        done: list[OpId] = []
        self.lease()
        while ids := [op.id for op in self.runnable()]:
            self.claim(*ids)
            done += self.finish(*ids)
        return done

    def head(self, run: RunId) -> int:
        return self.store.runs.get(self.tenant, run).head_seq

    def state(self, op_id: OpId) -> OpState:
        return self.store.ops.get(self.tenant, op_id).state


def make_world(store: Store) -> World:
    tenant = store.tenants.create("alice", now=1.0).tenant_id
    session = store.sessions.create(tenant, now=1.0).session_id
    worker = store.workers.register("w0", BASE, 10.0, 1000.0)
    return World(store, tenant, session, worker)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path, synchronous="NORMAL")
    yield opened
    opened.close()


@pytest.fixture
def world(store: Store) -> World:
    return make_world(store)
