"""Full fine-tuning: torch.optim.AdamW on the plain model, beside adapters that notice nothing of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.numerics.lab import (
    assert_same_bits,
    assert_same_result,
    datum,
    grads,
    item,
    make_trainer,
    relative,
    run_pass,
    spec,
)
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.errors import NoMemoryError, TooLargeError, UserError
from tinsmith.files.checkpoint_file import dump_state
from tinsmith.importing.archive import Stretch
from tinsmith.importing.state import look_at_state
from tinsmith.model import BaseModel, plain_shapes
from tinsmith.training import Trainer
from tinsmith.types import AdamParams, Datum, Failure, OpId, OptimItem, RunId, RunState

BOUND = 1e-5
FULL = replace(spec("f"), rank=0)
NEIGHBOUR = spec("b", 8, seed=2)


def full_trainer(base: BaseModel) -> Trainer:
    trainer = make_trainer(base, NEIGHBOUR)
    trainer.create_run(FULL)
    return trainer


def plain(base: BaseModel) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base.info.path, dtype=torch.float64, attn_implementation="eager")


def backward(model: torch.nn.Module, data: Sequence[Datum]) -> list[torch.Tensor]:
    logprobs = []
    for one in data:
        logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(one.inputs["target_tokens"])
        lp = logits.log_softmax(-1).gather(1, targets.view(len(targets), -1)).view(targets.shape)
        (-(torch.from_numpy(one.inputs["weights"]) * lp).sum()).backward()
        logprobs.append(lp.detach())
    return logprobs


def step(trainer: Trainer, params: AdamParams) -> None:
    (result,) = trainer.optim_step([OptimItem(OpId("x"), RunId("f"), params)])
    assert not isinstance(result, Failure)


def test_it_is_adamw_on_the_plain_model(base: BaseModel) -> None:
    """Five steps with decay and clipping; every weight of the model, its embedding, norms and biases too."""
    rng = np.random.default_rng(4)
    trainer, model = full_trainer(base), plain(base)
    params = AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.99, eps=1e-5, weight_decay=0.1, grad_clip_norm=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1)
    for _ in range(5):
        data = [datum(rng, n) for n in (20, 33)]
        data.append(datum(rng, 9, num_targets=2))
        optimizer.zero_grad()
        expected = backward(model, data)
        (result, _) = run_pass(trainer, [item("f", data), item("b", [datum(rng, 9)])], max_tokens=30)
        for ours, theirs in zip(result.logprobs, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
        own = grads(trainer, "f")
        assert own.keys() == {f"grad/{name}" for name, _ in model.named_parameters()}
        whole = np.concatenate([own[f"grad/{name}"].reshape(-1) for name, _ in model.named_parameters()])
        theirs = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        assert relative(whole, theirs) < BOUND
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        step(trainer, params)
    tensors = trainer.export_run(RunId("f"), ("param",)).tensors
    errors = {name: relative(tensors[f"param/{name}"], p) for name, p in model.named_parameters()}
    assert max(errors.values()) < BOUND, errors


def test_neighbours_and_the_base_are_left_alone(base: BaseModel) -> None:
    """To the bit; and neither cuts nor neighbours change the full run's."""
    rng = np.random.default_rng(5)
    data, others = [datum(rng, n) for n in (9, 30)], [datum(rng, n) for n in (30, 12)]
    trainer, alone, without = full_trainer(base), full_trainer(base), make_trainer(base, NEIGHBOUR)
    params = AdamParams(learning_rate=0.1)
    for _ in range(2):
        ours, neighbour = run_pass(trainer, [item("f", data), item("b", others)], max_tokens=10)
        (want,) = run_pass(alone, [item("f", data)])
        (want_neighbour,) = run_pass(without, [item("b", others)])
        assert_same_result(ours, want)
        assert_same_result(neighbour, want_neighbour)
        assert_same_bits(grads(trainer, "f"), grads(alone, "f"))
        assert_same_bits(grads(trainer, "b"), grads(without, "b"))
        for one in (trainer, alone):
            step(one, params)
    (forward,) = run_pass(trainer, [item("f", data, backward=False)])
    assert not np.array_equal(forward.logprobs[0], want.logprobs[0])


def test_a_failing_request_leaves_no_trace(base: BaseModel) -> None:
    """Its good data come first, and gradients were accumulated before; a pass that isn't committed neither."""
    rng = np.random.default_rng(6)
    good, bad = [datum(rng, 12)], [datum(rng, 20), datum(rng, 8)]
    bad[1].inputs["weights"][3] = np.inf
    trainer, want = full_trainer(base), full_trainer(base)
    for one in (trainer, want):
        run_pass(one, [item("f", good)])
    dropped = trainer.start_pass([item("f", good, 2)])
    while dropped.advance(10) is not None:
        pass
    first, failed, last = run_pass(trainer, [item("f", good, 3), item("f", bad, 4), item("f", good, 5)], max_tokens=1)
    assert isinstance(failed, Failure)
    assert (failed.code, failed.category) == ("non_finite_loss", "user")
    assert failed.message.startswith("datum 1:")
    assert_same_result(first, last)
    run_pass(want, [item("f", good, 3), item("f", good, 5)])
    assert_same_bits(grads(trainer, "f"), grads(want, "f"))


def test_a_saved_run_goes_on_where_it_was(base: BaseModel) -> None:
    """Another trainer, which has made no full run before."""
    rng = np.random.default_rng(7)
    data = [datum(rng, 25)]
    trainer = full_trainer(base)
    run_pass(trainer, [item("f", data)])
    step(trainer, AdamParams(learning_rate=1e-3))
    run_pass(trainer, [item("f", data)])
    state = trainer.export_run(RunId("f"))
    other = make_trainer(base)
    other.import_run(FULL, state)
    for one in (trainer, other):
        step(one, AdamParams(learning_rate=1e-3))
        run_pass(one, [item("f", data)])
    assert_same_bits(trainer.export_run(RunId("f")).tensors, other.export_run(RunId("f")).tensors)
    with pytest.raises(UserError, match="create a run like"):
        other.import_run(spec("a"), RunState(FULL, 0, state.tensors))


def test_what_does_not_fit_is_refused_with_the_memory_it_would_need(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = full_trainer(base)
    num_params = sum(p.numel() for p in plain(base).parameters())
    assert trainer.run_bytes(FULL) == 20 * num_params
    assert describe(BaseRef("x", Path(base.info.path))).num_params == num_params
    state = trainer.export_run(RunId("f"), ("param",))
    poor = make_trainer(base, NEIGHBOUR)
    monkeypatch.setattr(poor.full, "free_bytes", lambda: 20 * num_params - 1)
    sizes = rf"needs {20 * num_params / 2**30:.2f} GiB .*{(20 * num_params - 1) / 2**30:.2f} GiB are free"
    with pytest.raises(TooLargeError, match=sizes):
        poor.create_run(FULL)
    with pytest.raises(NoMemoryError, match=sizes):
        poor.import_run(FULL, state)
    assert not poor.has_run(RunId("f"))
    monkeypatch.setattr(poor.full, "free_bytes", lambda: 20 * num_params)
    poor.create_run(FULL)


def test_full_runs_side_by_side_keep_to_their_own_weights(base: BaseModel) -> None:
    """In one pass, and in passes that take turns: each as if it were alone, to the bit."""
    rng = np.random.default_rng(8)
    data = {name: [datum(rng, n) for n in (9, 20)] for name in "fg"}
    specs = {name: replace(FULL, run_id=RunId(name)) for name in "fg"}

    def trained(names: str) -> Trainer:
        trainer = make_trainer(base)
        for name in names:
            trainer.create_run(specs[name])
            run_pass(trainer, [item(name, data[name])])
            trainer.optim_step([OptimItem(OpId("x"), RunId(name), AdamParams(learning_rate=0.02))])
        return trainer

    alone = {name: trained(name) for name in "fg"}
    want = {name: run_pass(alone[name], [item(name, data[name], 2)])[0] for name in "fg"}
    assert not np.array_equal(want["f"].logprobs[0], want["g"].logprobs[0])
    both, turns = trained("fg"), trained("fg")
    found = run_pass(both, [item(name, data[name], 2) for name in "fg"], max_tokens=10)
    passes = {name: turns.start_pass([item(name, data[name], 2)]) for name in "fg"}
    while not all(one.is_computed for one in passes.values()):
        for one in passes.values():
            one.advance(10)
    for index, name in enumerate("fg"):
        assert_same_result(found[index], want[name])
        (result,) = passes[name].commit()
        assert_same_result(result, want[name])
        for trainer in (both, turns):
            assert_same_bits(grads(trainer, name), grads(alone[name], name))


def test_its_state_goes_through_an_import(base: BaseModel) -> None:
    """To the bit, and only into a base that has these weights."""
    state = full_trainer(base).export_run(RunId("f"), ("param",))
    stored = dump_state(state)
    shapes = plain_shapes(base.info)
    assert list(shapes) == [name.removeprefix("param/") for name in state.tensors]
    found = look_at_state(io.BytesIO(stored), Stretch(0, len(stored)), (), lambda: shapes)
    assert found.spec.is_full
    assert b"".join(found.pieces(state.spec)) == stored
    less = dict(list(shapes.items())[1:])
    for wanted, words in ((less, "has no layer"), (shapes | {"more": (3,)}, "lacks param/more")):
        with pytest.raises(UserError, match=words):
            look_at_state(io.BytesIO(stored), Stretch(0, len(stored)), (), lambda wanted=wanted: wanted)
