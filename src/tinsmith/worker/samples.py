"""The sample requests that this worker has taken into the engine, and the snapshots that they sample from."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from tinsmith.blobs import Blobs
from tinsmith.checkpoint_file import load_state
from tinsmith.engine import Engine
from tinsmith.errors import TinsmithError, UserError
from tinsmith.store import Store
from tinsmith.store.rows import OpRow
from tinsmith.types import Failure, OpId
from tinsmith.wire.media import PROTOBUF
from tinsmith.wire.meta import SampleMeta, read_meta
from tinsmith.wire.sampling import encode_sample_result
from tinsmith.worker.decode import Payloads
from tinsmith.worker.outcomes import Outcome, failed, succeeded
from tinsmith.worker.telling import Telling

log = structlog.get_logger("tinsmith.worker")

INTERNAL = "the sampler failed; the server's log has the details. Send the request again"


class Samples:
    def __init__(self, engine: Engine, store: Store, blobs: Blobs, payloads: Payloads, telling: Telling) -> None:
        self._engine = engine
        self._store = store
        self._blobs = blobs
        self._payloads = payloads
        self._telling = telling
        self._resident: dict[OpId, OpRow] = {}

    def admit(self, ops: Sequence[OpRow]) -> list[Outcome]:
        """Hand claimed requests to the engine; the outcomes of those that it refuses."""
        refused: list[Outcome] = []
        for op in ops:
            try:
                self._engine.submit_sample(self._payloads.sample_item(op, self._adapter(op)))
                self._resident[op.id] = op
                if read_meta(op.meta, SampleMeta).stream:
                    self._telling.begin(op.id)
            except TinsmithError as error:
                refused.append(failed(op, error.as_failure()))
        return refused

    def step(self) -> list[Outcome]:
        """Advance all resident sequences; the outcomes of the requests that ended."""
        try:
            ended = self._engine.step_samples()
        except Exception:
            log.exception("sampler step failed", resident=len(self._resident))
            return self._fail_all()
        outcomes: list[Outcome] = []
        for op_id, result in ended:
            op = self._resident.pop(op_id)
            self._telling.end(op_id)
            if isinstance(result, Failure):
                outcomes.append(failed(op, result))
            else:
                outcomes.append(succeeded(op, encode_sample_result(result), PROTOBUF))
        self._telling.tell()
        return outcomes

    def abandon(self) -> list[OpId]:
        """Forget all resident requests, to be sampled again by the next worker with the same seeds."""
        abandoned = list(self._resident)
        for op_id in abandoned:
            self._engine.cancel_sample(op_id)
            self._telling.end(op_id)
        self._resident.clear()
        return abandoned

    def _adapter(self, op: OpRow) -> str | None:
        if op.sampler_id is None:
            raise UserError("this request needs a sampler")
        sampler = self._store.samplers.get_any(op.sampler_id)
        if sampler.blob is None:
            return None
        if not self._engine.has_adapter(sampler.blob):
            self._engine.add_adapter(sampler.blob, load_state(self._blobs.get(sampler.blob)))
        return sampler.blob

    def _fail_all(self) -> list[Outcome]:
        outcomes = [failed(op, Failure("internal", "server", INTERNAL)) for op in self._resident.values()]
        self.abandon()
        return outcomes
