"""Failures stay with their op, states survive the way out and back, and the rules of losses and optimizer steps."""

import dataclasses
import math

import numpy as np
import pytest
import torch

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
from tinsmith.errors import UserError
from tinsmith.model import padded_rows
from tinsmith.training import head, losses
from tinsmith.training.losses import LOSSES, Loss, NativeLoss
from tinsmith.training.optimizer import global_norm
from tinsmith.types import AdamParams, Datum, Failure, OpId, OptimItem, RunId, RunState, Targets

RUN, OTHER = spec("a", 8), spec("b", 4, seed=2)
RL = "importance_sampling"


def spoiled(rng, length):
    good = datum(rng, length, RL)
    advantages = good.inputs["advantages"].copy()
    advantages[length // 2] = np.nan
    return Datum(good.tokens, {**good.inputs, "advantages": advantages})


@pytest.mark.parametrize("cuts", [10**6, 1, (45, 70, 1)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_op_that_fails_leaves_no_trace(base, cuts, place):
    rng = np.random.default_rng(0)
    before, after, neighbour = (
        item("a", [datum(rng, 40)], 1),
        item("a", [datum(rng, 9)], 3),
        item("b", [datum(rng, 20)]),
    )
    data = [datum(rng, n, RL) for n in (11, 44, 18)]
    data[place] = spoiled(rng, data[place].num_tokens)
    bad = item("a", data, 2, RL)
    trainer, expected = make_trainer(base, RUN, OTHER), make_trainer(base, RUN, OTHER)
    first, failure, third, fourth = run_pass(trainer, [before, bad, after, neighbour], cuts)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.category) == ("non_finite_loss", "user")
    assert f"datum {place}" in failure.message
    for result, other in zip((first, third, fourth), run_pass(expected, [before, after, neighbour], cuts), strict=True):
        assert_same_result(result, other)
    for run in ("a", "b"):
        assert_same_bits(grads(trainer, run), grads(expected, run))


def test_an_op_that_fails_after_a_datum_without_gradient(base):
    rng = np.random.default_rng(1)
    silent = datum(rng, 12, RL)
    silent = Datum(silent.tokens, {**silent.inputs, "advantages": np.zeros(12, np.float32)})
    trainer = make_trainer(base, RUN)
    (failure,) = run_pass(trainer, [item("a", [silent, datum(rng, 8, RL), spoiled(rng, 9)], loss=RL)], 1)
    assert isinstance(failure, Failure)
    assert not any(np.any(g) for g in grads(trainer, "a").values())


def test_a_pass_that_is_not_committed_leaves_no_trace(base):
    trainer = make_trainer(base, RUN)
    trainer.start_pass([item("a", [datum(np.random.default_rng(2), 30)])]).advance(100)
    assert not any(np.any(g) for g in grads(trainer, "a").values())


def test_weights_of_a_run_that_are_not_finite_fail_it_alone(base):
    rng = np.random.default_rng(3)
    trainer, expected = make_trainer(base, RUN, OTHER), make_trainer(base, RUN, OTHER)
    state = trainer.export_run(RUN.run_id)
    trainer.import_run(RUN, dataclasses.replace(state, tensors={k: v * np.nan for k, v in state.tensors.items()}))
    items = [item("a", [datum(rng, 33)]), item("b", [datum(rng, 20)])]
    failure, result = run_pass(trainer, items)
    assert isinstance(failure, Failure)
    assert_same_result(result, run_pass(expected, items)[1])
    assert_same_bits(grads(trainer, "b"), grads(expected, "b"))


def test_export_and_import_are_exact(base):
    rng = np.random.default_rng(4)
    trainer = make_trainer(base, RUN)
    run_pass(trainer, [item("a", [datum(rng, 25)])])
    trainer.optim_step([OptimItem(OpId("o"), RUN.run_id, AdamParams())])
    run_pass(trainer, [item("a", [datum(rng, 31)])])
    state = trainer.export_run(RUN.run_id)
    copy = spec("copy", RUN.rank)
    trainer.import_run(copy, state)
    again = trainer.export_run(copy.run_id)
    assert_same_bits(state.tensors, again.tensors)
    assert (again.step, again.spec) == (1, copy)
    more = [datum(rng, 17)]
    for name in ("a", "copy"):
        run_pass(trainer, [item(name, more)])
        trainer.optim_step([OptimItem(OpId("o"), RunId(name), AdamParams(learning_rate=0.1))])
    assert_same_bits(trainer.export_run(RUN.run_id).tensors, trainer.export_run(copy.run_id).tensors)
    assert_same_bits(state.tensors, again.tensors)


def test_weights_alone_start_with_fresh_moments(base):
    trainer = make_trainer(base, RUN)
    run_pass(trainer, [item("a", [datum(np.random.default_rng(5), 25)])])
    trainer.optim_step([OptimItem(OpId("o"), RUN.run_id, AdamParams())])
    trainer.import_run(RUN, trainer.export_run(RUN.run_id, ("param",)))
    state = trainer.export_run(RUN.run_id)
    assert state.step == 0
    assert not any(np.any(t) for name, t in state.tensors.items() if not name.startswith("param/"))


def test_state_names_and_the_first_adapter(base):
    trainer = make_trainer(base)
    trainer.create_run(RUN)
    tensors = trainer.export_run(RUN.run_id, ("param",)).tensors
    a = tensors["param/model.layers.1.mlp.down_proj.lora_A"]
    assert a.shape[0] == RUN.rank
    assert np.abs(a).max() <= a.shape[1] ** -0.5
    assert np.abs(a).mean() == pytest.approx(a.shape[1] ** -0.5 / 2, rel=0.1)
    assert tensors["param/model.unembed_tokens.lora_B"].shape == (VOCAB, RUN.rank)
    assert not np.any(tensors["param/model.unembed_tokens.lora_B"])
    trainer.create_run(RUN)
    assert_same_bits(tensors, trainer.export_run(RUN.run_id, ("param",)).tensors)


@pytest.mark.parametrize(
    ("other", "message"),
    [(spec("b", 4), "rank 8"), (spec("b", 8, Targets(unembed=False)), "attn"), (spec("b", 8), "lack")],
)
def test_a_state_that_does_not_fit_is_refused(base, other, message):
    trainer = make_trainer(base, RUN)
    state = trainer.export_run(RUN.run_id)
    if message == "lack":
        state = RunState(state.spec, 0, {k: v for k, v in state.tensors.items() if "q_proj" not in k})
    with pytest.raises(UserError, match=message):
        trainer.import_run(other, state)


def test_a_step_without_gradients_decays_alone(base):
    trainer = make_trainer(base, RUN)
    before = trainer.export_run(RUN.run_id, ("param",)).tensors
    params = AdamParams(learning_rate=0.1, weight_decay=0.5)
    (result,) = trainer.optim_step([OptimItem(OpId("o"), RUN.run_id, params)])
    assert result.metrics["grad_norm"] == 0
    assert result.metrics["optimizer_step"] == 1
    assert "step" not in result.metrics, "the cookbook merges these into rows whose own step it resumes by"
    for name, tensor in trainer.export_run(RUN.run_id, ("param",)).tensors.items():
        np.testing.assert_allclose(tensor, before[name] * 0.95, rtol=1e-6)


def test_gradients_that_are_not_finite_are_not_applied(base):
    trainer = make_trainer(base, RUN)
    state = trainer.export_run(RUN.run_id)
    spoilt = {k.replace("param/", "grad/"): np.full_like(v, np.inf) for k, v in state.tensors.items()}
    spoilt |= state.tensors
    trainer.import_run(RUN, RunState(state.spec, 0, spoilt))
    (failure,) = trainer.optim_step([OptimItem(OpId("o"), RUN.run_id, AdamParams())])
    assert isinstance(failure, Failure)
    assert failure.code == "non_finite_gradient"
    assert_same_bits(spoilt, trainer.export_run(RUN.run_id).tensors)


def test_the_norm_of_a_long_row():
    row = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    assert global_norm(row) == pytest.approx(float(row.double().norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", RL])
def test_coefficients_are_the_derivative(name):
    rng = np.random.default_rng(6)
    inputs = {key: torch.from_numpy(value) for key, value in datum(rng, 7, name).inputs.items()}
    lp = torch.randn(7, generator=torch.Generator().manual_seed(0)) - 5
    found = NativeLoss(LOSSES[name], {}).evaluate(lp, inputs)
    value, coef = found.loss, found.coef
    if name == RL:
        terms = [-math.exp(p - q) * a for p, q, a in zip(lp, inputs["logprobs"], inputs["advantages"], strict=True)]
        expected = torch.tensor(terms)
    else:
        terms = [-w * p for w, p in zip(inputs["weights"], lp, strict=True)]
        expected = -inputs["weights"]
    assert value == pytest.approx(float(sum(terms)), rel=1e-5)
    torch.testing.assert_close(coef, expected)


def test_cross_entropy_without_weights_counts_each_token_once():
    lp = torch.tensor([-1.0, -2.0])
    found = NativeLoss(LOSSES["cross_entropy"], {}).evaluate(lp, {})
    value, coef = found.loss, found.coef
    assert (value, coef.tolist()) == (3.0, [-1.0, -1.0])


def test_a_loss_that_ties_tokens_of_different_chunks(base, monkeypatch):
    """Such a loss is evaluated on the whole datum; a token-wise one declared so gives what it gives otherwise."""
    monkeypatch.setattr(head, "WHOLE_BYTES", 0)
    rng = np.random.default_rng(7)
    items = [item("a", [datum(rng, n, "cross_entropy") for n in (10, 100, 33)])]
    trainer, tied = make_trainer(base, RUN), make_trainer(base, RUN)
    (expected,) = run_pass(trainer, items)
    tie = Loss(LOSSES["cross_entropy"].fn, is_tokenwise=False)
    monkeypatch.setattr(losses, "LOSSES", {"cross_entropy": tie})
    (result,) = run_pass(tied, items)
    assert_same_bits(dict(enumerate(result.logprobs)), dict(enumerate(expected.logprobs)))
    assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    assert_same_bits(grads(tied, "a"), grads(trainer, "a"))


def test_logits_are_held_a_chunk_at_a_time(base):
    """The chunk's size moves nothing but the grid on which a long datum is cut: logprobs stay, gradients nearly so.

    No piece has fewer than 12 rows, whose products with the head's adapter take other kernels.
    """
    rng = np.random.default_rng(8)
    items = [item("a", [datum(rng, n) for n in (13, 96, 45)])]
    small, large = make_trainer(base, RUN, chunk_tokens=16), make_trainer(base, RUN, chunk_tokens=512)
    (one,), (other,) = run_pass(small, items), run_pass(large, items)
    assert_same_bits(dict(enumerate(one.logprobs)), dict(enumerate(other.logprobs)))
    for name, grad in grads(small, "a").items():
        np.testing.assert_allclose(grad, grads(large, "a")[name], rtol=0, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize("unembed", [False, True])
def test_tokens_of_weight_zero_have_no_part_in_the_heads_backward(base, unembed, monkeypatch):
    """60 tokens before an answer of four: four rows go through the head backwards, and through its adapter."""
    rows, lora_rows = [], []
    matrix = type(base.head)
    backward, adapter = matrix.times_transpose, head.add_adapter_grads
    monkeypatch.setattr(matrix, "times_transpose", lambda own, dy: rows.append(dy.shape) or backward(own, dy))
    monkeypatch.setattr(
        head,
        "add_adapter_grads",
        lambda weights, grads, h, *rest: lora_rows.append(len(h)) or adapter(weights, grads, h, *rest),
    )
    tokens = np.random.default_rng(5).integers(0, VOCAB, 65)
    weights = np.r_[np.zeros(60), np.ones(4)].astype(np.float32)
    answer = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": weights})
    run_pass(make_trainer(base, spec("a", targets=Targets(unembed=unembed)), chunk_tokens=64), [item("a", [answer])])
    assert [num for num, width in rows if width == VOCAB] == [padded_rows(4)]
    assert lora_rows == [4] * unembed


@pytest.mark.parametrize("unembed", [False, True])
def test_the_softmax_of_many_blocks(base, unembed, monkeypatch):
    """However many rows are in a core's cache at a time, the bits are the same; with an adapter of the head as well."""
    run = spec("a", 8, targets=Targets(unembed=unembed))
    items = [item("a", [datum(np.random.default_rng(3), n) for n in (13, 70)])]
    many, one = make_trainer(base, run), make_trainer(base, run)
    monkeypatch.setattr(head, "CACHED_LOGITS", 3 * VOCAB)
    (some,) = run_pass(many, items)
    monkeypatch.setattr(head, "CACHED_LOGITS", 10**9)
    (whole,) = run_pass(one, items)
    assert_same_bits(dict(enumerate(some.logprobs)), dict(enumerate(whole.logprobs)))
    assert_same_bits(grads(many, "a"), grads(one, "a"))
