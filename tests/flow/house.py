"""A store, files and workers over the fake engine in one process: crashes are objects that are dropped."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from tinsmith.config import Settings
from tinsmith.fake_engine import MODULE, FakeEngine
from tinsmith.files.blobs import Blobs, payload_key
from tinsmith.ipc.bell import Bell, Ringer
from tinsmith.ipc.tokenline import TokenSender
from tinsmith.store import open_store
from tinsmith.store.rows import NewOp, NewRun, NewSampler, OpRow
from tinsmith.types import (
    BaseInfo,
    BlobKey,
    OpId,
    OpKind,
    RunId,
    RunSpec,
    RunState,
    SamplerId,
    SessionId,
)
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import JSON, PROTOBUF, encode_json
from tinsmith.wire.meta import CreateMeta, LoadMeta, SampleMeta, SaveMeta, SaveSamplerMeta, to_meta
from tinsmith.worker.loop import Worker

BASE = BaseInfo("fake/base", "/nowhere", "Fake", vocab_size=100, max_context=256, eos_tokens=(0,))


class House:
    """One data directory. `worker()` is a new worker process on it; the one before is dead from then on."""

    synchronous = "NORMAL"

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        defaults = {"data_dir": root, "scan_interval_s": 0.05, "device": "fake"}
        self.settings = Settings.load({}, **(defaults | settings))
        self.store = open_store(root, synchronous=self.synchronous)
        self.blobs = Blobs(root / "blobs")
        self.key_id: str | None = None  # that requests come with
        self.be("alice")
        self._num_runs = 0
        self._open: list[Bell | Ringer] = []
        self.engine = FakeEngine(BASE, self.settings.pass_max_tokens)

    def be(self, name: str) -> None:
        """What is asked for from now on is asked by a new tenant, in a session of its own."""
        self.tenant = self.store.tenants.create(name).tenant_id
        self.session = self.store.sessions.create(
            self.tenant, tags=[], user_metadata={}, sdk_version="0", project_id=None, display_name=None
        ).session_id

    def worker(self, slot: str = "fake/base#0", line: TokenSender | None = None) -> Worker:
        self.engine = FakeEngine(BASE, self.settings.pass_max_tokens)
        me = self.store.workers.register(slot, BASE.name, self.settings.lease_s, time.time())
        path = self.root / f"b{len(self._open)}"
        bell, wake, api = Bell(path), Ringer(path), Ringer(self.root / "api")
        self._open += [bell, wake, api]
        return Worker(me, self.store, self.blobs, self.engine, self.settings, bell, api, wake.ring, line)

    def close(self) -> None:
        for open_socket in self._open:
            open_socket.close()
        self.store.close()

    def create_run(self, rank: int = 4, seed: int = 1) -> RunId:
        run_id = RunId(f"{self.session}:train:{self._num_runs}")
        spec = RunSpec(run_id, BASE.name, rank=rank, seed=seed)
        run = NewRun(self.tenant, self.session, self._num_runs, spec)
        self._num_runs += 1
        op = self.op(OpKind.CREATE, run_id, 0, meta=to_meta(CreateMeta(spec)), payload=None)
        self.acknowledged(self.store.ops.create_run(run, op, time.time()).row)
        return run_id

    def acknowledged(self, row: OpRow) -> None:
        """Told of every request that was stored."""

    def forward_backward(
        self, run: RunId, seq: int, tokens: list[int], *, forward_only: bool = False, copies: int = 1
    ) -> OpRow:
        request = pb.ForwardBackwardRequest(
            model_id=run, seq_id=seq, loss_fn="cross_entropy", forward_only=forward_only
        )
        for _ in range(copies):
            datum = request.data.add()
            datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
            target = datum.loss_fn_inputs["target_tokens"]
            target.dense = np.array(tokens, "<i8").tobytes()
            target.dtype = pb.DT_I64
            target.shape.append(len(tokens))
        kind = OpKind.FORWARD if forward_only else OpKind.FORWARD_BACKWARD
        body = request.SerializeToString()
        return self.enqueue(self.op(kind, run, seq, payload=body, media=PROTOBUF, cost=len(tokens) * copies))

    def optim_step(self, run: RunId, seq: int, learning_rate: float = 0.1) -> OpRow:
        body = encode_json({"adam_params": {"learning_rate": learning_rate}})
        return self.enqueue(self.op(OpKind.OPTIM_STEP, run, seq, payload=body))

    def save(self, run: RunId, seq: int, name: str) -> OpRow:
        return self.enqueue(self.op(OpKind.SAVE, run, seq, meta=to_meta(SaveMeta(name)), payload=None))

    def save_sampler(self, run: RunId, seq: int, sampler: SamplerId) -> OpRow:
        meta = to_meta(SaveSamplerMeta(None, sampler, SessionId(self.session)))
        return self.enqueue(self.op(OpKind.SAVE_SAMPLER, run, seq, meta=meta, payload=None))

    def load(self, run: RunId, seq: int, blob: BlobKey, *, optimizer: bool = True) -> OpRow:
        meta = to_meta(LoadMeta("tinker://x/weights/y", blob, optimizer))
        return self.enqueue(self.op(OpKind.LOAD, run, seq, meta=meta, payload=None))

    def sampler(self, blob: BlobKey | None = None, number: int = 0) -> SamplerId:
        sampler_id = SamplerId(f"{self.session}:sample:{number}")
        new = NewSampler(self.tenant, SessionId(self.session), sampler_id, BASE.name, blob=blob)
        self.store.samplers.create(new, time.time())
        return sampler_id

    def sample(
        self, sampler: SamplerId, seq: int, *, seed: int = 3, max_tokens: int = 40, records_routes: bool = False
    ) -> OpRow:
        body = {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": max_tokens},
            "num_samples": 2,
            "record_stability_info": records_routes,
        }
        op = NewOp(
            tenant_id=self.tenant,
            kind=OpKind.SAMPLE,
            base_model=BASE.name,
            id=_op_id(),
            seq_id=seq,
            sampler_id=sampler,
            cost_tokens=max_tokens,
            payload=encode_json(body),
            payload_bytes=len(encode_json(body)),
            meta=to_meta(SampleMeta(seed, sampler, 2)),
            key_id=self.key_id,
        )
        return self.enqueue(op)

    def enqueue(self, op: NewOp) -> OpRow:
        row = self.store.ops.enqueue(op, time.time()).row
        self.acknowledged(row)
        return row

    def get(self, op: OpRow) -> OpRow:
        return self.store.ops.get(op.tenant_id, op.id)

    def result(self, op: OpRow) -> bytes:
        row = self.get(op)
        assert row.failure is None, row.failure
        assert row.state == "done", row.state
        if row.result_blob is not None:
            return self.blobs.get(row.result_blob)
        assert row.result is not None
        return row.result

    def weights(self, run: RunId) -> np.ndarray:
        return self.engine.export_run(run).tensors[f"param/{MODULE}"]

    def state(self, run: RunId) -> RunState:
        return self.engine.export_run(run)

    def op(
        self,
        kind: OpKind,
        run: RunId,
        seq: int,
        *,
        payload: bytes | None,
        meta: dict[str, Any] | None = None,
        media: str = JSON,
        cost: int = 0,
    ) -> NewOp:
        op_id = _op_id()
        blob = None
        size = len(payload or b"")
        if payload is not None and size > self.settings.inline_bytes:
            blob = self.blobs.put(payload_key(self.tenant, op_id), payload).key
            payload = None
        return NewOp(
            tenant_id=self.tenant,
            kind=kind,
            base_model=BASE.name,
            id=op_id,
            seq_id=seq,
            run_id=run,
            cost_tokens=cost,
            payload=payload,
            payload_blob=blob,
            payload_bytes=size,
            media=media,
            meta=meta or {},
            key_id=self.key_id,
        )


def train(house: House, run: RunId, steps: range) -> list[OpRow]:
    """A pass and a step each; the steps' numbers say which tokens and seq ids."""
    ops = []
    for step in steps:
        ops.append(house.forward_backward(run, 2 * step + 1, [step + 1, 2, 3]))
        ops.append(house.optim_step(run, 2 * step + 2))
    return ops


def settle(worker: Worker, *, seconds: float = 60) -> None:
    """Let the worker work until nothing is left to do, its files included.

    It has come to rest when it looked once more and found nothing, with no file being written.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        worker._heard_at = float("-inf")
        worker._must_look = True
        worker._queue.distrust()
        is_idle = not worker.step() and not (worker._must_look or worker._must_plan)
        num_pending = worker._writer.num_pending + worker.runs.residency.num_coming
        num_pending += worker._samples.num_coming + len(worker._publisher._due)
        if is_idle and not num_pending:
            worker._recorder.flush()
            return
        if num_pending:
            time.sleep(0.002)
    raise AssertionError("the worker did not come to rest")


def _op_id() -> OpId:
    return OpId(f"req-{uuid.uuid4().hex}")
