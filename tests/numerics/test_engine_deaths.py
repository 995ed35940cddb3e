"""The named points at which the engine may die lie between the runs of a merge, and before a step has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.numerics.lab import datum, grads, item, make_trainer, run_pass, spec
from tinsmith import crashpoints
from tinsmith.training.optimizer import optim_steps
from tinsmith.types import AdamParams, OpId, OptimItem, RunId


class DeathError(BaseException):
    """In place of SIGKILL."""


@pytest.fixture(autouse=True)
def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def die(pid: int, number: int) -> None:
        raise DeathError

    monkeypatch.setattr(os, "kill", die)
    yield
    crashpoints.disarm()


def two_runs(base: Any) -> Any:
    rng = np.random.default_rng(0)
    trainer = make_trainer(base, spec("a", 4), spec("b", 4))
    return trainer, [item("a", [datum(rng, 9)]), item("b", [datum(rng, 11)])]


def test_a_death_within_a_merge_leaves_one_run_merged_and_the_other_not(base: Any) -> None:
    trainer, items = two_runs(base)
    crashpoints.arm("pass.half_merged")
    with pytest.raises(DeathError):
        run_pass(trainer, items)
    has_gradients = [any(np.any(tensor) for tensor in grads(trainer, run).values()) for run in ("a", "b")]
    assert sorted(has_gradients) == [False, True]


@pytest.mark.parametrize("may_compile", [True, False])
def test_a_death_within_a_step_leaves_weights_changed_and_a_step_not_taken(
    base: Any, may_compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled program counts its steps at the end; torch's kernel steps runs of other settings one by one."""
    trainer, items = two_runs(base)
    if not may_compile:
        monkeypatch.setattr(trainer, "_optim_steps", optim_steps)
    run_pass(trainer, items)
    runs = RunId("a"), RunId("b")
    before = [trainer.export_run(run).tensors for run in runs]
    crashpoints.arm("optim.half_done")
    with pytest.raises(DeathError):
        trainer.optim_step(
            [
                OptimItem(OpId(run), run, AdamParams(learning_rate=rate))
                for run, rate in zip(runs, (0.1, 0.2), strict=True)
            ]
        )
    after = [trainer.export_run(run) for run in runs]
    assert sum(state.step for state in after) < len(runs)
    assert any(
        np.any(state.tensors[name] != tensor)
        for state, tensors in zip(after, before, strict=True)
        for name, tensor in tensors.items()
        if name.startswith("param/")
    )
