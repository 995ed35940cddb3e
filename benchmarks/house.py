"""A worker in this process, over a real store and real files, for benchmarks that ask what the service has to do.

Requests are put into the store as the API does it, by a second connection that doesn't wait for the disk: what the
client's side costs is not asked here. The worker's own store is as durable as the service's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.files.blobs import Blobs
from tinsmith.ipc.bell import Bell, Ringer
from tinsmith.store import open_store
from tinsmith.store.rows import NewOp, NewRun
from tinsmith.torch_engine import TorchEngine
from tinsmith.types import OpId, OpKind, RunId, RunSpec, SamplerId, SessionId
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import JSON, PROTOBUF, encode_json
from tinsmith.wire.meta import CreateMeta, SampleMeta, SaveSamplerMeta, to_meta
from tinsmith.worker.loop import Worker

BASE = describe(parse("tinsmith/tiny"))


class House:
    def __init__(
        self, root: Path, stack: ExitStack, engine: Callable[[Settings], Any] | None = None, **settings: Any
    ) -> None:
        """engine: makes another one than the shipped model's."""
        root.mkdir(exist_ok=True)
        self._make_engine = engine or partial(TorchEngine, BASE)
        silence()
        self.root = root
        self.settings = Settings.load({}, data_dir=root, **settings)
        self.store = open_store(root, synchronous="FULL")
        self.client = open_store(root, synchronous="NORMAL")
        self.blobs = Blobs(root / "blobs")
        self.sign_up()
        self._stack = stack
        self._num_workers = 0
        stack.callback(self.store.close)
        stack.callback(self.client.close)
        self.answered: dict[OpId, float] = {}
        self.start_worker()

    def sign_up(self) -> None:
        """Who asks for everything."""
        self.tenant = self.client.tenants.create("bench").tenant_id
        self.session = self.client.sessions.create(self.tenant).session_id

    def start_worker(self) -> None:
        """A new worker process, as it were, in the place of the last one."""
        self._num_workers += 1
        self.engine = self._make_engine(self.settings)
        me = self.store.workers.register("0", BASE.name, 3600.0, time.time())
        path = self.root / f"bell{self._num_workers}"
        bell = self._stack.enter_context(Bell(path))
        self._wake = Ringer(path)
        api = Ringer(self.root / "api")
        self.worker = Worker(me, self.store, self.blobs, self.engine, self.settings, bell, api, self._wake.ring)
        record = self.worker._recorder.record

        def watched(outcomes: Any, **how: Any) -> None:
            record(outcomes, **how)
            now = time.perf_counter()
            for outcome in outcomes:
                if outcome.finished.failure is not None:
                    raise SystemExit(outcome.finished.failure.message)
                self.answered[outcome.op.id] = now

        self.worker._recorder.record = watched  # type: ignore[method-assign]

    def work(self, until: Collection[OpId] | None = None) -> None:
        """Let the worker work until these are answered; without them, until it comes to rest."""
        self._wake.ring()
        quiet = 0
        while quiet < 5:
            is_busy = self.turn()
            if until is not None and all(op in self.answered for op in until):
                return
            if not is_busy:
                quiet += until is None and not self.worker._writer.num_pending

    def turn(self) -> bool:
        """One turn of the worker's loop, and a short sleep if it found nothing to do."""
        if self.worker.step():
            return True
        if self.worker._bell.wait(0.01):
            self.worker._must_look = True
        return False

    def create_run(self, number: int, rank: int) -> RunId:
        run_id = RunId(f"{self.session}:train:{number}")
        spec = RunSpec(run_id, BASE.name, rank=rank, seed=number)
        op = self._op(OpKind.CREATE, run_id, 0, meta=to_meta(CreateMeta(spec)))
        self.client.ops.create_run(NewRun(self.tenant, self.session, number, spec), op, time.time())
        return run_id

    def forward_backward(self, run: RunId, seq: int, length: int) -> OpId:
        tokens = np.random.default_rng(seq).integers(0, BASE.vocab_size, length)
        request = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn="cross_entropy")
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = tokens.astype("<i4").tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = tokens.astype("<i8").tobytes(), pb.DT_I64
        target.shape.append(length)
        body = request.SerializeToString()
        return self._enqueue(self._op(OpKind.FORWARD_BACKWARD, run, seq, payload=body, media=PROTOBUF, cost=length))

    def optim_step(self, run: RunId, seq: int) -> OpId:
        body = encode_json({"adam_params": {"learning_rate": 1e-4}})
        return self._enqueue(self._op(OpKind.OPTIM_STEP, run, seq, payload=body))

    def save_sampler(self, run: RunId, seq: int, number: int) -> tuple[SamplerId, OpId]:
        sampler = SamplerId(f"{self.session}:sample:{number}")
        meta = to_meta(SaveSamplerMeta(None, sampler, SessionId(self.session)))
        return sampler, self._enqueue(self._op(OpKind.SAVE_SAMPLER, run, seq, meta=meta))

    def sample(self, sampler: SamplerId, seq: int, max_tokens: int = 1) -> OpId:
        body = {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": max_tokens},
            "num_samples": 1,
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
            meta=to_meta(SampleMeta(3, sampler, 1)),
        )
        return self._enqueue(op)

    def _enqueue(self, op: NewOp) -> OpId:
        return self.client.ops.enqueue(op, time.time()).row.id

    def _op(
        self,
        kind: OpKind,
        run: RunId,
        seq: int,
        *,
        payload: bytes | None = None,
        meta: dict[str, Any] | None = None,
        media: str = JSON,
        cost: int = 0,
    ) -> NewOp:
        return NewOp(
            tenant_id=self.tenant,
            kind=kind,
            base_model=BASE.name,
            id=_op_id(),
            seq_id=seq,
            run_id=run,
            cost_tokens=cost,
            payload=payload,
            payload_bytes=len(payload or b""),
            media=media,
            meta=meta or {},
        )


def silence() -> None:
    structlog.configure(processors=[_drop])


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


def _op_id() -> OpId:
    return OpId(f"req-{uuid.uuid4().hex}")
