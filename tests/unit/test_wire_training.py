"""The forward_backward surface against the real SDK's encoder and decoder."""

from __future__ import annotations

import numpy as np
import pytest
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tinsmith.errors import UnsupportedError
from tinsmith.types import OpKind, TrainResult
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.bounds import read_address
from tinsmith.wire.media import WireError
from tinsmith.wire.tensors import ElementBudget, decode_tensor
from tinsmith.wire.training import decode_training, encode_train_result


def sdk_body(data: list[types.Datum], *, loss: str = "cross_entropy", config: object = None, seq_id: int = 3) -> bytes:
    request = ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config),
        model_id="s1:train:0",
        seq_id=seq_id,
    )
    return forward_backward_request_to_proto(request).SerializeToString()


def sdk_datum(tokens: list[int], **inputs: types.TensorData) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=dict(inputs))


def dense(values: list[float] | list[int], dtype: str, shape: list[int] | None = None) -> types.TensorData:
    return types.TensorData(data=values, dtype=dtype, shape=shape)


def test_sdk_request_decodes_to_our_types() -> None:
    first = sdk_datum([1, 2, 3], target_tokens=dense([2, 3, 4], "int64", [3]), weights=dense([0, 1, 0.5], "float32"))
    second = sdk_datum([5], target_tokens=dense([6], "int64"))
    request = decode_training(sdk_body([first, second], config={"beta": 0.5, "mode": "x"}))
    assert (request.run_id, request.seq_id, request.kind) == ("s1:train:0", 3, OpKind.FORWARD_BACKWARD)
    assert request.loss.name == "cross_entropy"
    assert request.loss.config == {"beta": 0.5, "mode": "x"}
    assert request.num_tokens == 4
    assert request.data[0].tokens.dtype == np.int32
    np.testing.assert_array_equal(request.data[0].inputs["target_tokens"], [2, 3, 4])
    assert request.data[0].inputs["weights"].dtype == np.float32
    assert request.data[1].inputs["target_tokens"].shape == (1,)


def test_item_is_what_the_engine_takes() -> None:
    request = decode_training(sdk_body([sdk_datum([1], target_tokens=dense([2], "int64"))]))
    item = request.item("req-1")
    assert item.backward
    assert (item.op_id, item.seq_id, item.num_tokens) == ("req-1", 3, 1)


def test_sparse_rows_come_out_dense() -> None:
    sparse = types.TensorData(
        data=[7, 8, 9], dtype="int64", shape=[3, 4], sparse_crow_indices=[0, 2, 2, 3], sparse_col_indices=[0, 3, 1]
    )
    request = decode_training(sdk_body([sdk_datum([1, 2, 3], target_tokens=sparse)]))
    expected = [[7, 0, 0, 8], [0, 0, 0, 0], [0, 9, 0, 0]]
    np.testing.assert_array_equal(request.data[0].inputs["target_tokens"], expected)


@pytest.mark.parametrize(
    ("crow", "cols", "shape"),
    [
        ([0, 1], [0], [2, 2]),  # too few rows
        ([0, 1, 2], [0, 2], [2, 2]),  # column out of range
        ([0, 2, 1], [0, 1], [2, 2]),  # falling row pointers
        ([0, 1, 3], [0, 1], [2, 2]),  # more values than there are
        ([0, 1, 2], [0, -1], [2, 2]),
        ([1, 1, 2], [0, 1], [2, 2]),
        ([0, 1, 2], [0, 1], [2]),
    ],
)
def test_broken_sparse_tensors_are_refused(crow: list[int], cols: list[int], shape: list[int]) -> None:
    tensor = pb.Tensor(dtype=pb.DT_F32, shape=shape)
    tensor.sparse_csr.values = np.ones(2, np.float32).tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.array(cols, np.int64).tobytes()
    with pytest.raises(WireError, match="weights"):
        decode_tensor(tensor, "weights", ElementBudget())


def test_a_sparse_tensor_cannot_claim_the_memory() -> None:
    tensor = pb.Tensor(dtype=pb.DT_F32, shape=[2**30, 2**30])
    tensor.sparse_csr.SetInParent()
    with pytest.raises(WireError, match="at most"):
        decode_tensor(tensor, "weights", ElementBudget())


def test_bfloat16_widens_exactly() -> None:
    tensor = pb.Tensor(dtype=pb.DT_BF16, dense=np.array([0x3F80, 0xC000], "<u2").tobytes())
    np.testing.assert_array_equal(decode_tensor(tensor, "weights", ElementBudget()), np.float32([1.0, -2.0]))


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(dtype=pb.DT_F32, dense=b"123"),
        pb.Tensor(dtype=pb.DT_F32, dense=b"1234", shape=[2]),
        pb.Tensor(dtype=pb.DT_UNSPECIFIED, dense=b"1234"),
        pb.Tensor(dtype=pb.DT_F32, dense=b"1234", shape=[-1]),
        pb.Tensor(dtype=pb.DT_F32, dense=b"1234", shape=[1, 1, 1]),
    ],
)
def test_broken_dense_tensors_are_refused(tensor: pb.Tensor) -> None:
    with pytest.raises(WireError, match="advantages"):
        decode_tensor(tensor, "advantages", ElementBudget())


def test_the_address_survives_what_comes_after_it() -> None:
    body = sdk_body([sdk_datum([1], target_tokens=dense([2], "int64"))])
    broken = body[:-3]
    assert read_address(broken) == ("s1:train:0", 3)
    with pytest.raises(WireError) as caught:
        decode_training(broken)
    assert caught.value.address == ("s1:train:0", 3)
    assert read_address(body[:20]) == ("s1:train:0", 3)


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xff\xff", b'{"model_id": "a"}', pb.ForwardBackwardRequest(seq_id=1).SerializeToString()]
)
def test_bytes_without_an_address(body: bytes) -> None:
    assert read_address(body) is None
    with pytest.raises(WireError) as caught:
        decode_training(body)
    assert caught.value.address is None


def test_seq_id_zero_is_no_address() -> None:
    assert read_address(sdk_body([], seq_id=0)) is None


def test_images_are_refused_by_name() -> None:
    message = pb.ForwardBackwardRequest(model_id="r", seq_id=1)
    message.data.add().model_input.add().image.format = "png"
    with pytest.raises(UnsupportedError, match="token chunks"):
        decode_training(message.SerializeToString())


def test_results_decode_in_the_sdk_with_their_shapes() -> None:
    ragged = (
        np.float32([-1, -2, -3]),
        np.float32([-4]),
        np.float32([[-5, -6], [-7, -8]]),
        np.float32([[-9, -10, -11]]),
    )
    output = deserialize_forward_backward_output(encode_train_result(TrainResult(ragged, {"loss:sum": 1.5})))
    assert output.metrics == {"loss:sum": 1.5}
    assert output.loss_fn_output_type == "ArrayRecord"
    assert [tuple(row["logprobs"].shape) for row in output.loss_fn_outputs] == [(3,), (1,), (2, 2), (1, 3)]
    for row, expected in zip(output.loss_fn_outputs, ragged, strict=True):
        np.testing.assert_array_equal(np.array(row["logprobs"].tolist()), expected)


def test_an_empty_result_decodes() -> None:
    assert deserialize_forward_backward_output(encode_train_result(TrainResult((), {}))).loss_fn_outputs == []
