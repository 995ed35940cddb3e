"""A run's rows: what is zero isn't there, what was read is taken over, and many steps at once are torch's own."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.numerics.lab import CPU, datum, item, make_trainer, run_pass, spec
from tinsmith.files.checkpoint_file import dump_state, load_state
from tinsmith.model import RowLayout
from tinsmith.training.optimizer import GROUP_PARAMS, optim_steps
from tinsmith.training.runs import RunSlot
from tinsmith.training.steps import optim_steps_for
from tinsmith.types import AdamParams, OpId, OptimItem, OptimResult, RunId

NUM_STEPS = 4


def slots_of(base, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slots = []
    for number, rank in enumerate(ranks):
        own = spec(f"r{number}", rank, seed=number)
        slots.append(RunSlot.fresh(own, RowLayout.of(base.linears, own), CPU))
        slots[-1].rows["param"].normal_(generator=generator)
    return slots


def params_of(number: int) -> AdamParams:
    """All different but for the first two; every second one clips."""
    return AdamParams(
        learning_rate=0.01 * (1 + max(0, number - 1)),
        beta1=0.9 if number < 2 else 0.8,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1 * (number // 2),
        grad_clip_norm=2.0 if number % 2 else 0.0,
    )


@pytest.fixture(params=[True, False], ids=["program", "torch"])
def steps(request):
    found = optim_steps_for(CPU, may_compile=request.param)
    if request.param and found is optim_steps:
        pytest.skip("needs a C compiler and AVX2")
    return found


@pytest.mark.parametrize("ranks", [(2, 2, 3, 4, 5), (8, 16, 8)])
def test_steps_of_many_runs_are_those_of_torch(base, ranks, steps):
    """Some steps have no gradients, which count as zeros; some runs begin later than others."""
    generator = torch.Generator().manual_seed(1)
    slots = slots_of(base, ranks)
    params = [params_of(number) for number in range(len(slots))]
    twins = [torch.nn.Parameter(slot.rows["param"].clone()) for slot in slots]
    optimizers = [
        torch.optim.AdamW(
            [twin], lr=own.learning_rate, betas=(own.beta1, own.beta2), eps=own.eps, weight_decay=own.weight_decay
        )
        for twin, own in zip(twins, params, strict=True)
    ]
    for step in range(NUM_STEPS):
        chosen = [number for number in range(len(slots)) if step or number != 1]
        for number in chosen:
            twins[number].grad = torch.zeros_like(twins[number])
            if (step + number) % 3:
                twins[number].grad.normal_(generator=generator)
                slots[number].rows["grad"] = twins[number].grad.clone()
        results = steps([slots[number] for number in chosen], [params[number] for number in chosen])
        for number, result in zip(chosen, results, strict=True):
            norm = float(twins[number].grad.double().norm())
            if params[number].grad_clip_norm:
                torch.nn.utils.clip_grad_norm_([twins[number]], params[number].grad_clip_norm)
            optimizers[number].step()
            clipped = float(twins[number].grad.double().norm())
            assert isinstance(result, OptimResult)
            assert result.metrics["clip_factor"] == pytest.approx(clipped / norm if norm else 1, rel=1e-5)
            assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
            assert result.metrics["optimizer_step"] == slots[number].step
            assert "grad" not in slots[number].rows
    for slot, twin, optimizer in zip(slots, twins, optimizers, strict=True):
        torch.testing.assert_close(slot.rows["param"], twin.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slot.rows["v"], optimizer.state[twin]["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_a_step_does_not_depend_on_what_shares_its_call(base, steps):
    small = slots_of(base, [2] * 6)
    assert sum(slot.layout.num_params for slot in small[:2]) <= GROUP_PARAMS
    alone = slots_of(base, [2] * 6)
    for slots in (small, alone):
        generator = torch.Generator().manual_seed(3)
        for slot in slots:
            slot.rows["grad"] = torch.randn(slot.layout.num_params, generator=generator)
    params = [params_of(number) for number in range(6)]
    steps(small, params)
    for slot, own in zip(alone, params, strict=True):
        steps([slot], [own])
    for one, other in zip(small, alone, strict=True):
        for part in ("param", "m", "v"):
            assert torch.equal(one.rows[part], other.rows[part])


def test_what_is_zero_takes_no_room(base):
    own = spec("a", 4)
    trainer = make_trainer(base)
    trainer.create_run(own)
    assert parts_of(trainer) == {"param"}
    run_pass(trainer, [item("a", [datum(np.random.default_rng(0), 12)])])
    assert parts_of(trainer) == {"param", "grad"}
    trainer.optim_step([OptimItem(OpId("o"), own.run_id, AdamParams())])
    assert parts_of(trainer) == {"param", "m", "v"}
    assert trainer.num_bytes == trainer.run_bytes(own)
    trainer.drop_run(own.run_id)
    assert trainer.num_bytes == 0


def parts_of(trainer):
    return {name.partition("/")[0] for name in trainer.export_run(RunId("a")).tensors}


def test_a_state_that_was_read_is_taken_over(base):
    trainer = make_trainer(base, spec("a", 4))
    state = load_state(dump_state(trainer.export_run(RunId("a"))))
    own = spec("b", 4)
    trainer.import_run(own, state, may_keep=True)
    name = next(iter(state.tensors))
    exported = trainer.export_run(own.run_id, copy=False)
    assert np.shares_memory(exported.tensors[name], state.tensors[name])
    trainer.import_run(own, state)
    assert not np.shares_memory(trainer.export_run(own.run_id, copy=False).tensors[name], state.tensors[name])


def test_a_state_in_another_order_is_laid_out_anew(base):
    trainer = make_trainer(base, spec("a", 4))
    state = trainer.export_run(RunId("a"))
    sorted_state = dataclasses.replace(state, tensors=dict(sorted(state.tensors.items())))
    trainer.import_run(spec("b", 4), load_state(dump_state(sorted_state)), may_keep=True)
    again = trainer.export_run(RunId("b"))
    assert list(again.tensors) == list(state.tensors)
    for name, tensor in state.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)


def test_published_weights_stay_as_they_were(base):
    trainer = make_trainer(base, spec("a", 4))
    before = trainer.export_run(RunId("a"), ("param",)).tensors
    weights = trainer.copy_weights(RunId("a"))
    run_pass(trainer, [item("a", [datum(np.random.default_rng(0), 12)])])
    trainer.optim_step([OptimItem(OpId("o"), RunId("a"), AdamParams(learning_rate=0.1))])
    for name, tensor in weights.on_host().tensors.items():
        np.testing.assert_array_equal(tensor, before[name])
