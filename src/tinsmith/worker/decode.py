"""From an op's recorded payload to what the engine takes. The payload is the request's body as it arrived."""

from __future__ import annotations

from tinsmith.blobs import Blobs
from tinsmith.errors import CorruptError
from tinsmith.store.rows import OpRow
from tinsmith.types import AdamParams, SampleItem, TrainItem
from tinsmith.wire.meta import SampleMeta, read_meta
from tinsmith.wire.requests import decode_optim_step
from tinsmith.wire.sampling import decode_sample
from tinsmith.wire.training import decode_training


class Payloads:
    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def train_item(self, op: OpRow) -> TrainItem:
        item = decode_training(self._bytes(op)).item(op.id)
        if item.run_id != op.run_id:
            raise CorruptError(f"the payload of {op.id} names another run; send the request again")
        return item

    def adam_params(self, op: OpRow) -> AdamParams:
        return decode_optim_step(self._bytes(op))

    def sample_item(self, op: OpRow, adapter: str | None) -> SampleItem:
        seed = read_meta(op.meta, SampleMeta).seed
        return decode_sample(self._bytes(op)).item(op.id, adapter, seed)

    def _bytes(self, op: OpRow) -> bytes:
        if op.payload is not None:
            return op.payload
        if op.payload_blob is not None:
            return self._blobs.get(op.payload_blob)
        raise CorruptError(f"the payload of {op.id} is gone; send the request again")
