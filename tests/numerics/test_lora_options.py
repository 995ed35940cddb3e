"""Alpha, rsLoRA and ranks of single layers: what peft computes with the same configuration, in a pass with others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.lab import (
    PeftTwin,
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
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample, state_of
from tinsmith.errors import UserError
from tinsmith.lora_options import LoraOptions
from tinsmith.model import BaseModel
from tinsmith.types import AdamParams, Datum, OpId, OptimItem, RunId, RunSpec, Targets

BOUND = 1e-5
MIXED = LoraOptions(ranks=(("k_proj", 3), ("lm_head", 2), ("mlp", 12), ("up_proj", 1)))
IN_PEFT = {"k_proj": 3, "lm_head": 2, "gate_proj": 12, "up_proj": 1, "down_proj": 12}
CASES: dict[str, tuple[RunSpec, dict[str, Any]]] = {
    "alpha": (replace(spec("a"), alpha=6.0), {}),
    "rslora": (replace(spec("a"), alpha=8.0, options=LoraOptions(use_rslora=True)), {"use_rslora": True}),
    "ranks": (replace(spec("a"), options=MIXED), {"rank_pattern": IN_PEFT}),
    "alphas": (
        replace(spec("a"), options=LoraOptions(alphas=(("attn", 4.0), ("q_proj", 10.0)))),
        {"alpha_pattern": {"q_proj": 10, "k_proj": 4, "v_proj": 4, "o_proj": 4}},
    ),
    "all": (
        replace(spec("a"), alpha=5.0, options=replace(MIXED, alphas=(("v_proj", 3.0),), use_rslora=True)),
        {"rank_pattern": IN_PEFT, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ),
}
NEIGHBOURS = (spec("b", 8, seed=2), spec("c", 3, Targets(mlp=False, unembed=False), seed=3))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "merged"])
def test_gradients_and_steps_are_those_of_peft(base: BaseModel, case: str, deterministic: bool) -> None:
    """eps stays far from the gradients: where |g| is about eps, Adam turns rounding into a different step."""
    run, in_peft = CASES[case]
    rng = np.random.default_rng(5)
    trainer = make_trainer(base, run, *NEIGHBOURS, deterministic=deterministic)
    twin = PeftTwin(base, trainer.export_run(run.run_id), **in_peft)
    params = AdamParams(learning_rate=1e-3, eps=1e-5, weight_decay=0.1, grad_clip_norm=0.5)
    optimizer = torch.optim.AdamW(twin.params.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    for step in range(2):
        data = [datum(rng, n) for n in (7, 40, 33)]
        result, *_ = run_pass(
            trainer, [item("a", data), *(item(other.run_id, [datum(rng, 20)]) for other in NEIGHBOURS)]
        )
        optimizer.zero_grad()
        _, logprobs = twin.backward(data)
        if step == 0:  # later the parameters differ already, by rounding
            for ours, theirs in zip(result.logprobs, logprobs, strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
            own = grads(trainer, "a")
            errors = {name: relative(own[f"grad/{name}"], p.grad) for name, p in twin.params.items()}
            assert max(errors.values()) < BOUND, errors
        torch.nn.utils.clip_grad_norm_(twin.params.values(), 0.5)
        optimizer.step()
        trainer.optim_step([OptimItem(OpId("x"), RunId("a"), params)])
    tensors = trainer.export_run(RunId("a"), ("param",)).tensors
    errors = {name: relative(tensors[f"param/{name}"], p) for name, p in twin.params.items()}
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_neighbours_and_cuts_change_no_bit(base: BaseModel, threads: int) -> None:
    run = CASES["all"][0]
    rng = np.random.default_rng(6)
    data, others = [datum(rng, n) for n in (9, 44, 21)], [datum(rng, n) for n in (30, 12)]
    alone, among = make_trainer(base, run), make_trainer(base, run, *NEIGHBOURS)
    (want,) = run_pass(alone, [item("a", data)])
    got, neighbour, _ = run_pass(among, [item("a", data), item("b", others), item("c", others)], max_tokens=40)
    assert_same_result(got, want)
    assert_same_bits(grads(among, "a"), grads(alone, "a"))
    plain = make_trainer(base, *NEIGHBOURS)
    (want_neighbour,) = run_pass(plain, [item("b", others)])
    assert_same_result(neighbour, want_neighbour)
    assert_same_bits(grads(among, "b"), grads(plain, "b"))


def test_what_is_beyond_a_layers_rank_stays_zero(base: BaseModel) -> None:
    """In the row, for gradients and moments too; a saved state holds nothing of it, and comes back to the bit."""
    run = CASES["all"][0]
    trainer = make_trainer(base, run)
    rng = np.random.default_rng(7)
    for _ in range(3):
        run_pass(trainer, [item("a", [datum(rng, 30)])])
        trainer.optim_step([OptimItem(OpId("x"), RunId("a"), AdamParams(learning_rate=1e-2, weight_decay=0.1))])
    run_pass(trainer, [item("a", [datum(rng, 30)])])
    slot = trainer._slots[RunId("a")]
    layout = slot.layout
    assert layout.num_own < layout.num_params
    own_P = layout.tensors_to_row(
        "own", {name.replace("param", "own"): np.ones_like(t) for name, t in slot.export(("param",)).tensors.items()},
        base.device,
    )  # fmt: skip
    assert int(own_P.sum()) == layout.num_own
    for part, row_P in slot.rows.items():
        assert not row_P[own_P == 0].any(), part
        assert row_P[own_P == 1].any(), part
    state = trainer.export_run(RunId("a"))
    assert sum(t.size for name, t in state.tensors.items() if name.startswith("m/")) == layout.num_own
    other = make_trainer(base)
    other.import_run(run, state)
    for part, row_P in slot.rows.items():
        assert torch.equal(other._slots[RunId("a")].rows[part], row_P), part


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "merged"])
def test_sampled_logprobs_are_those_of_the_trainer(base: BaseModel, case: str, deterministic: bool) -> None:
    """Rows of adapters of several shapes in one batch."""
    run = CASES[case][0]
    states = {"a": state_of(base, run), **{str(one.run_id): state_of(base, one) for one in NEIGHBOURS}}
    trainer = make_trainer(base)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = [
        sample(f"{key}{i}", prompt(i, 9 + i), key, seed=i, max_tokens=12, prompt_logprobs=True)
        for i in range(3) for key in states
    ]  # fmt: skip
    results = run_all(make_sampler(base, states, deterministic=deterministic), items)
    for request in items:
        sampled = results[request.op_id]
        tokens = np.concatenate([request.prompt, sampled.sequences[0].tokens])
        wanted = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
        (result,) = run_pass(trainer, [item(str(request.adapter), [wanted], backward=False)])
        ours = np.concatenate([sampled.prompt_logprobs[1:], sampled.sequences[0].logprobs])
        np.testing.assert_allclose(ours, result.logprobs[0], atol=BOUND, rtol=0)


def test_a_checkpoint_of_another_shape_is_refused_by_name(base: BaseModel) -> None:
    trainer = make_trainer(base, CASES["ranks"][0])
    state = trainer.export_run(RunId("a"))
    with pytest.raises(UserError, match="rank_pattern"):
        trainer.import_run(spec("a"), state)
    with pytest.raises(UserError, match="k_proj"):
        trainer.create_run(replace(spec("z", 8, Targets(attn=False)), options=MIXED))
