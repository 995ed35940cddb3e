"""From an op's recorded payload to what the engine takes. The payload is the request's body as it arrived."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from tinsmith.errors import CorruptError
from tinsmith.files.blobs import Blobs
from tinsmith.loss_graph import LossGraph
from tinsmith.store.checksums import whole_payload
from tinsmith.store.rows import OpRow
from tinsmith.types import AdamParams, BaseInfo, BlobKey, SampleItem, TrainItem
from tinsmith.validate.requests import CUSTOM
from tinsmith.wire.custom_loss import decode_custom_loss
from tinsmith.wire.images import Sight
from tinsmith.wire.meta import LossMeta, SampleMeta, read_meta
from tinsmith.wire.requests import decode_optim_step
from tinsmith.wire.sampling import decode_sample
from tinsmith.wire.training import decode_training

MAX_GRAPHS = 64


class Payloads:
    def __init__(self, blobs: Blobs, info: BaseInfo) -> None:
        self._blobs = blobs
        self._sight = Sight(info.name, info.vision)
        self._graphs: OrderedDict[BlobKey, LossGraph] = OrderedDict()

    def train_item(self, op: OpRow) -> TrainItem:
        request = decode_training(self._bytes(op), self._sight)
        if request.loss.name == CUSTOM:
            request = request.with_graph(self._graph(read_meta(op.meta, LossMeta).blob))
        item = request.item(op.id)
        if item.run_id != op.run_id:
            raise CorruptError(f"the payload of {op.id} names another run; send the request again")
        return item

    def adam_params(self, op: OpRow) -> AdamParams:
        return decode_optim_step(self._bytes(op))

    def sample_item(self, op: OpRow, adapter: str | None) -> SampleItem:
        seed = read_meta(op.meta, SampleMeta).seed
        return replace(decode_sample(self._bytes(op), self._sight).item(op.id, adapter, seed), scope=op.tenant_id)

    def _graph(self, blob: BlobKey) -> LossGraph:
        """A custom loss; its file never changes, so those used last are kept."""
        graph = self._graphs.pop(blob, None)
        if graph is None:
            graph = decode_custom_loss(self._blobs.get(blob))
        self._graphs[blob] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _bytes(self, op: OpRow) -> bytes:
        payload = whole_payload(op)
        if payload is not None:
            return payload
        if op.payload_blob is not None:
            return self._blobs.get(op.payload_blob)
        raise CorruptError(f"the payload of {op.id} is gone; send the request again")
