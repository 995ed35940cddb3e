"""Uploaded losses against the client's own evaluation of the same functions: value, metrics and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from tinker.lib.public_interfaces.custom_loss import run_loss_handle

from tests.numerics.custom_losses import NUM_ANSWERS, RANKS, answers, gspo, make_inputs, trace, upload
from tests.numerics.lab import (
    VOCAB,
    assert_same_bits,
    assert_same_result,
    datum,
    grads,
    item,
    make_trainer,
    run_pass,
    spec,
)
from tinsmith.training import head
from tinsmith.training.graph import GraphProgram
from tinsmith.training.losses import CustomLoss
from tinsmith.types import Datum, LossSpec, OpId, RunId, TrainItem, TrainResult
from tinsmith.wire.custom_loss import decode_custom_loss

FUNCTIONS = list(RANKS)
NAMES = [fn.__name__ for fn in FUNCTIONS]


def random_data(rng, fn, lengths=(9, 40, 17)):
    data = []
    for length in lengths:
        shape = (length, NUM_ANSWERS) if fn is answers else (length,)
        inputs = {"target_tokens": rng.integers(0, VOCAB, shape), **make_inputs(rng, fn, length)}
        data.append(Datum(rng.integers(0, VOCAB, length).astype(np.int32), inputs))
    return tuple(data)


def custom(run, data, fn, seq=1):
    graph = decode_custom_loss(upload(trace(fn)))
    return TrainItem(OpId(f"{run}-{seq}"), RunId(run), seq, data, LossSpec("custom", {"loss_id": "x"}, graph), True)


def sdk_data(data):
    def tensor(array):
        return types.TensorData.from_torch(torch.from_numpy(np.asarray(array)))

    return [
        tinker.Datum(
            model_input=types.ModelInput.from_ints(d.tokens.tolist()),
            loss_fn_inputs={name: tensor(array) for name, array in d.inputs.items()},
        )
        for d in data
    ]


def client_route(trainer, run, data, fn):
    """As `forward_backward_custom` does it: a forward, the loss in torch, and its gradient as cross-entropy weights."""
    plain = tuple(Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"]}) for d in data)
    (forward,) = run_pass(trainer, [item(run, plain, 1, backward=False)])
    logprobs = [torch.from_numpy(lp).requires_grad_() for lp in forward.logprobs]
    loss, metrics = run_loss_handle(trace(fn), sdk_data(data), logprobs)
    loss.backward()
    weighted = tuple(
        Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"], "weights": -lp.grad.numpy()})
        for d, lp in zip(data, logprobs, strict=True)
    )
    (backward,) = run_pass(trainer, [item(run, weighted, 2)])
    return float(loss.detach()), metrics, backward


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_value_and_gradient_are_those_of_the_client(base, fn):
    data = random_data(np.random.default_rng(1), fn)
    here, there = make_trainer(base, spec("a", 8)), make_trainer(base, spec("a", 8))
    (result,) = run_pass(here, [custom("a", data, fn)])
    loss, metrics, backward = client_route(there, "a", data, fn)
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-6)
    for one, other in zip(result.logprobs, backward.logprobs, strict=True):
        assert np.array_equal(one, other)
    assert {k: v for k, v in result.metrics.items() if k.startswith("custom/")} == pytest.approx(metrics, rel=1e-6)
    ours, theirs = grads(here, "a"), grads(there, "a")
    errors = {name: float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in ours}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_coefficients_are_those_of_double_precision(fn):
    """The loss as a function of the log-probabilities alone."""
    rng = np.random.default_rng(2)
    shape = (64, NUM_ANSWERS) if fn is answers else (64,)
    lp = torch.from_numpy(rng.normal(-2, 0.7, shape).astype(np.float32))
    inputs = {n: torch.from_numpy(x) for n, x in make_inputs(rng, fn, 64, lp.numpy()).items()}
    found = CustomLoss(GraphProgram(decode_custom_loss(upload(trace(fn))))).evaluate(lp, inputs)
    exact_lp = lp.double().requires_grad_()
    exact, _ = fn(exact_lp, *(inputs[name].double() for name in list(RANKS[fn])[1:]))
    (exact_coef,) = torch.autograd.grad(exact, exact_lp)
    assert found.loss == pytest.approx(float(exact.detach()), rel=1e-6, abs=1e-6)
    assert float((found.coef - exact_coef).norm() / exact_coef.norm()) < 1e-6


@pytest.mark.parametrize("whole_bytes", [0, 70 * VOCAB * 4, 2**28])
def test_a_datum_longer_than_a_chunk_of_logits(base, monkeypatch, whole_bytes):
    """The loss sees the whole datum, whether its logits are held at once or cut and made twice."""
    data = random_data(np.random.default_rng(3), gspo, (10, 100, 33, 70))
    monkeypatch.setattr(head, "WHOLE_BYTES", whole_bytes)
    cut = make_trainer(base, spec("a", 8), chunk_tokens=32)
    whole = make_trainer(base, spec("a", 8), chunk_tokens=128)
    (one,), (other,) = (run_pass(trainer, [custom("a", data, gspo)]) for trainer in (whole, cut))
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6)
    for name, array in grads(whole, "a").items():
        assert np.linalg.norm(array - grads(cut, "a")[name]) <= 1e-5 * np.linalg.norm(array)


def test_custom_and_native_losses_of_many_runs_share_a_pass(base):
    rng = np.random.default_rng(4)
    specs = [spec(f"r{i}", 4, seed=i) for i in range(len(FUNCTIONS) + 1)]
    items = [custom(f"r{i}", random_data(rng, fn, (12 + i,)), fn) for i, fn in enumerate(FUNCTIONS)]
    items.append(item(f"r{len(FUNCTIONS)}", [datum(rng, 20, "gspo")], loss="gspo"))
    items.sort(key=lambda one: one.run_id)
    together = make_trainer(base, *specs)
    before = base.num_forwards
    results = run_pass(together, items)
    assert base.num_forwards == before + 1
    by_run = {one.run_id: one for one in specs}
    for one, result in zip(items, results, strict=True):
        alone = make_trainer(base, by_run[one.run_id])
        (expected,) = run_pass(alone, [one])
        assert_same_result(result, expected)
        assert_same_bits(grads(together, one.run_id), grads(alone, one.run_id))


def test_a_pack_is_cut_by_what_the_loss_costs_too(base):
    """Calls and elements count beside tokens, and where a pass is cut changes no bit."""

    def long(logprobs):
        total = logprobs.sum()
        for _ in range(60):
            total = total + (logprobs * logprobs).sum()
        return total, {}

    def wide(logprobs):
        return torch.outer(logprobs, logprobs.new_ones(2**20)).mean(), {}

    rng = np.random.default_rng(1)
    data = tuple(datum(rng, 2) for _ in range(12))
    for fn, budget, num_packs in ((long, 400, 6), (wide, 20, 8)):
        graph = decode_custom_loss(upload(trace(fn, {"logprobs": 1})))
        one = TrainItem(OpId("o"), RunId("a"), 1, data, LossSpec("custom", {"loss_id": "x"}, graph), True)
        whole, cut = make_trainer(base, spec("a")), make_trainer(base, spec("a"))
        run_pass(whole, [one])
        training_pass, works = cut.start_pass([one]), []
        while (stats := training_pass.advance(budget)) is not None:
            works.append(stats.work)
        assert isinstance(training_pass.commit()[0], TrainResult)
        assert len(works) >= num_packs
        assert max(works) <= budget or fn is wide
        assert_same_bits(grads(cut, "a"), grads(whole, "a"))
        assert one.work == 12 * (2 + len(graph.calls))
