"""`cross_entropy` with sparse (CSR) targets and weights, from the SDK's encoder to the gradient."""

import numpy as np
import pytest
import torch
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tests.numerics.lab import (
    VOCAB,
    assert_same_bits,
    assert_same_result,
    grads,
    make_trainer,
    relative,
    run_pass,
    spec,
)
from tinsmith.types import OpId, TrainItem
from tinsmith.wire.training import decode_training

N, K = 12, 5


def decoded(tokens: list[int], **inputs: types.TensorData) -> TrainItem:
    """The request as the SDK writes it and the server reads it."""
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=dict(inputs))
    request = ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=[datum], loss_fn="cross_entropy"), model_id="a", seq_id=1
    )
    return decode_training(forward_backward_request_to_proto(request).SerializeToString()).item(OpId("o"))


@pytest.fixture
def rows():
    """Tokens, targets [N, K], weights [N, K] of either sign, and which of them are listed: 0 to K a position."""
    rng = np.random.default_rng(3)
    is_listed = rng.random((N, K)) < 0.5
    is_listed[2], is_listed[5] = False, True
    weights = np.where(is_listed, rng.normal(size=(N, K)), 0).astype(np.float32)
    return rng.integers(0, VOCAB, N).tolist(), rng.integers(0, VOCAB, (N, K)), weights, is_listed


def dense(array: np.ndarray) -> types.TensorData:
    return types.TensorData(data=array, dtype="int64" if array.dtype == np.int64 else "float32", shape=[N, K])


def csr(array: np.ndarray, is_listed: np.ndarray) -> types.TensorData:
    return types.TensorData(
        data=array[is_listed],
        dtype="int64" if array.dtype == np.int64 else "float32",
        shape=[N, K],
        sparse_crow_indices=[0, *is_listed.sum(1).cumsum().tolist()],
        sparse_col_indices=is_listed.nonzero()[1].tolist(),
    )


def computed(base, item: TrainItem):
    trainer = make_trainer(base, spec("a", 8))
    (result,) = run_pass(trainer, [item])
    return result, grads(trainer, "a")


def test_sparse_targets_have_the_numbers_of_dense_ones(base, rows):
    tokens, targets, weights, is_listed = rows
    sparse, gradient = computed(
        base, decoded(tokens, target_tokens=csr(targets, is_listed), weights=csr(weights, is_listed))
    )
    padded = np.where(is_listed, targets, 0)
    same, same_gradient = computed(base, decoded(tokens, target_tokens=dense(padded), weights=dense(weights)))
    assert_same_result(sparse, same)
    assert_same_bits(gradient, same_gradient)

    other, other_gradient = computed(base, decoded(tokens, target_tokens=dense(targets), weights=dense(weights)))
    listed = other.logprobs[0][is_listed]
    np.testing.assert_array_equal(sparse.logprobs[0][is_listed], listed)
    expected = -float(np.dot(weights[is_listed].astype(np.float64), listed.astype(np.float64)))
    assert sparse.metrics["loss:sum"] == pytest.approx(expected, rel=1e-6, abs=0)
    for name, array in gradient.items():
        assert relative(array, torch.from_numpy(other_gradient[name])) < 1e-6, "what isn't listed has no gradient"


def test_sparse_weights_may_go_with_dense_targets(base, rows):
    tokens, targets, weights, is_listed = rows
    mixed, gradient = computed(base, decoded(tokens, target_tokens=dense(targets), weights=csr(weights, is_listed)))
    plain, plain_gradient = computed(base, decoded(tokens, target_tokens=dense(targets), weights=dense(weights)))
    assert_same_result(mixed, plain)
    assert_same_bits(gradient, plain_gradient)
