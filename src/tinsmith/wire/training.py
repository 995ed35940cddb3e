"""The forward_backward surface: a protobuf request in, a protobuf result out.

Knows the messages and nothing of what makes a request sensible (see `validate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from google.protobuf.message import DecodeError

from tinsmith.errors import UnsupportedError
from tinsmith.loss_graph import LossGraph
from tinsmith.types import Array, Datum, FloatArray, LossSpec, OpId, OpKind, RunId, TrainItem, TrainResult
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.bounds import read_address
from tinsmith.wire.images import BLIND, Chunks, Looking, Sight
from tinsmith.wire.media import WireError
from tinsmith.wire.routes import decode_routes
from tinsmith.wire.tensors import ElementBudget, decode_tensor, decode_tokens, encode_floats

OUTPUT_TYPE = "ArrayRecord"


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    run_id: RunId
    seq_id: int
    data: tuple[Datum, ...]
    loss: LossSpec
    forward_only: bool

    @property
    def num_tokens(self) -> int:
        return sum(datum.num_tokens for datum in self.data)

    @property
    def kind(self) -> OpKind:
        return OpKind.FORWARD if self.forward_only else OpKind.FORWARD_BACKWARD

    def with_graph(self, graph: LossGraph) -> TrainingRequest:
        """The same with what its custom loss computes. The wire has no shape of a scalar, so those that the loss
        declares to be scalars become such."""
        scalars = [declared.name for declared in graph.inputs if declared.rank == 0]
        data = tuple(replace(datum, inputs=_with_scalars(datum.inputs, scalars)) for datum in self.data)
        return replace(self, data=data, loss=replace(self.loss, graph=graph))

    def item(self, op_id: OpId) -> TrainItem:
        """The request as the engine takes it."""
        return TrainItem(
            op_id=op_id,
            run_id=self.run_id,
            seq_id=self.seq_id,
            data=self.data,
            loss=self.loss,
            backward=not self.forward_only,
        )


def _with_scalars(inputs: Mapping[str, Array], names: Sequence[str]) -> Mapping[str, Array]:
    changed = {name: inputs[name].reshape(()) for name in names if name in inputs and inputs[name].size == 1}
    return {**inputs, **changed}


def decode_training(body: bytes, sight: Sight = BLIND) -> TrainingRequest:
    """A forward_backward request, of either kind; sparse inputs come out dense.

    Raises:
        WireError: it can't be read; `address` is set if the run and seq_id could.
        UserError: pictures that can't be shown to the base model.
        UnsupportedError: audio among the inputs, or pictures where the base takes none.
    """
    address = read_address(body)
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise WireError("the request body is no ForwardBackwardRequest message", address) from None
    if address is None:
        raise WireError("a forward_backward request needs a model_id and a seq_id of at least 1")
    if address != (message.model_id, message.seq_id):
        raise WireError("the request names more than one model_id or seq_id: give each once", address)
    budget, looking = ElementBudget(), Looking(sight)
    try:
        routes = decode_routes(message)
        data = tuple(
            replace(_decode_datum(datum, index, budget, looking), routes=routes.get(index))
            for index, datum in enumerate(message.data)
        )
    except WireError as error:
        raise WireError(error.message, address) from None
    return TrainingRequest(
        run_id=RunId(message.model_id),
        seq_id=message.seq_id,
        data=data,
        loss=LossSpec(name=message.loss_fn, config=_decode_config(message)),
        forward_only=message.forward_only,
    )


def encode_train_result(result: TrainResult) -> bytes:
    """A ForwardBackwardOutput with `logprobs` for each datum, in order; where K changes a new record begins."""
    output = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    for trailing, group in groupby(result.logprobs, key=lambda array: array.shape[1:]):
        _add_record(output, list(group), trailing)
    for key, value in result.metrics.items():
        output.metrics[key] = value
    return bytes(output.SerializeToString())


def _add_record(output: pb.ForwardBackwardOutput, arrays: Sequence[FloatArray], trailing: Sequence[int]) -> None:
    parts = [encode_floats(array) for array in arrays]
    record = output.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(arrays))
    field = record.fields["logprobs"]
    field.data = b"".join(parts)
    field.offsets = np.cumsum([0, *map(len, parts)]).astype("<i8").tobytes()
    field.dtype = pb.DT_F32
    field.trailing_shape.extend(trailing)


def _decode_datum(datum: pb.Datum, index: int, budget: ElementBudget, looking: Looking) -> Datum:
    chunks = Chunks(looking, f"datum {index}")
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind == "encoded_text":
            chunks.add_tokens(decode_tokens(chunk.encoded_text.tokens))
        elif kind == "image":
            _add_picture(chunks, chunk.image)
        else:
            raise UnsupportedError(f"datum {index}: only token chunks and pictures can be trained on, no audio")
    inputs: dict[str, Array] = {
        name: decode_tensor(tensor, f"datum {index}, {name[:100]}", budget)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Datum(tokens=chunks.tokens, inputs=inputs, pictures=chunks.pictures)


def _add_picture(chunks: Chunks, image: pb.ImageChunk) -> None:
    size = image.override_dimensions
    chunks.add_picture(
        image.data,
        image.format,
        image.expected_tokens if image.HasField("expected_tokens") else None,
        (size.width, size.height) if image.HasField("override_dimensions") else None,
    )


def _decode_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    return config
