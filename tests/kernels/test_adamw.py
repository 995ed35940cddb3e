"""One launch for runs of different sizes and hyperparameters, against torch.optim.AdamW for each."""

import numpy as np
import pytest
import torch

from tests.kernels.lab import DEVICE
from tinsmith.model import LinearInfo, RowLayout
from tinsmith.training.adamw_kernels import StepRows, global_norms, step_runs
from tinsmith.training.optimizer import optim_steps
from tinsmith.training.runs import RunSlot
from tinsmith.training.steps import launched_steps
from tinsmith.types import AdamParams, Failure, RunId, RunSpec, Targets

SIZES = (5, 1000, 4096, 20_001)
PARAMS = (
    AdamParams(learning_rate=1e-3, eps=1e-8),
    AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.99, eps=1e-12, weight_decay=0.1, grad_clip_norm=0.5),
    AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1e9),
    AdamParams(),
)


def make_rows(size: int, *, with_copy: bool) -> dict[str, torch.Tensor]:
    rows = {part: torch.zeros(size, device=DEVICE) for part in ("grad", "m", "v")}
    rows["param"] = torch.randn(size).to(DEVICE)
    if with_copy:
        rows["copy"] = rows["param"].bfloat16()
    return rows


def as_step(rows: dict[str, torch.Tensor], step: int) -> StepRows:
    return StepRows(rows["param"], rows["grad"], rows["m"], rows["v"], rows.get("copy"), step)


@pytest.mark.parametrize("with_copy", [True, False])
def test_four_steps(with_copy: bool):
    torch.manual_seed(0)
    runs = [make_rows(size, with_copy=with_copy) for size in SIZES]
    twins = [torch.nn.Parameter(rows["param"].clone()) for rows in runs]
    optimizers = [
        torch.optim.AdamW([twin], lr=p.learning_rate, betas=(p.beta1, p.beta2), eps=p.eps, weight_decay=p.weight_decay)
        for twin, p in zip(twins, PARAMS, strict=True)
    ]
    for step in range(4):
        for rows in runs:
            rows["grad"].copy_(torch.randn(len(rows["grad"])))
        norms = step_runs([as_step(rows, step) for rows in runs], PARAMS)
        for rows, twin, optimizer, params, norm in zip(runs, twins, optimizers, PARAMS, norms, strict=True):
            twin.grad = rows["grad"].clone()
            assert norm == pytest.approx(float(rows["grad"].double().norm()), rel=1e-6)
            torch.nn.utils.clip_grad_norm_([twin], params.grad_clip_norm or float("inf"))
            optimizer.step()
    for rows, twin in zip(runs, twins, strict=True):
        theirs = twin.detach()
        assert float((rows["param"] - theirs).norm() / theirs.norm()) < 1e-6
        if with_copy:  # triton's interpreter cuts bfloat16 off, where a GPU rounds
            torch.testing.assert_close(rows["copy"].float(), rows["param"], rtol=2**-7, atol=0)


def test_a_run_whose_gradients_are_not_finite_is_left_alone():
    torch.manual_seed(1)
    good, bad = make_rows(300, with_copy=True), make_rows(200, with_copy=True)
    good["grad"].fill_(1.0)
    bad["grad"].fill_(1.0)
    bad["grad"][77] = float("nan")
    before = {part: row.clone() for part, row in bad.items()}
    norms = step_runs([as_step(bad, 0), as_step(good, 0)], [AdamParams(), AdamParams()])
    assert np.isnan(norms[0])
    for part in ("param", "m", "v", "copy"):
        assert torch.equal(bad[part], before[part])
    assert good["m"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_step_as_on_the_cpu(dtype: torch.dtype):
    """Slots with and without gradients and moments, one of them not finite: outcomes, parameters and step counts."""
    sides = []
    for steps in (launched_steps, optim_steps):
        slots = [make_slot(index, dtype) for index in range(3)]
        slots[0].rows["grad"] = torch.linspace(-1, 1, slots[0].layout.num_params, device=DEVICE)
        slots[2].rows["grad"] = torch.full((slots[2].layout.num_params,), float("inf"), device=DEVICE)
        params = [AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5)] * 3
        outcomes = [steps(slots, params) for _ in range(2)]
        sides.append((slots, outcomes))
    (ours, found), (theirs, expected) = sides
    for got, want in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        if isinstance(want, Failure):
            assert got == want
        else:
            assert got.metrics == pytest.approx(want.metrics, rel=1e-6)
    for slot, twin in zip(ours, theirs, strict=True):
        assert slot.step == twin.step
        assert slot.rows.keys() == twin.rows.keys()
        torch.testing.assert_close(slot.rows["param"], twin.rows["param"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(slot.compute_P.float(), twin.compute_P.float(), rtol=2**-6, atol=0)


def make_slot(seed: int, dtype: torch.dtype) -> RunSlot:
    linear = LinearInfo("l", "attn", 33, 17, "l")
    layout = RowLayout([linear], Targets(), 4 + seed, dtype)
    return RunSlot.fresh(RunSpec(RunId(f"r{seed}"), "base", 4 + seed, seed, Targets()), layout, DEVICE)


def test_a_long_norm_is_exact():
    torch.manual_seed(2)
    rows = [torch.randn(size).to(DEVICE) for size in (3_000_000, 17)]
    expected = [float(row.double().norm()) for row in rows]
    np.testing.assert_allclose(global_norms(rows).cpu().numpy(), expected, rtol=1e-6)
