"""Activation checkpointing: less memory, the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.lab import assert_same_bits, assert_same_result, datum, grads, item, make_trainer, run_pass, spec
from tinsmith.config import Settings
from tinsmith.model import BaseModel
from tinsmith.model.peak import PeakMeter
from tinsmith.training import Trainer
from tinsmith.training.budget import MARGIN, Budget
from tinsmith.training.footprint import measure
from tinsmith.types import Targets

CPU = torch.device("cpu")
RUNS = (
    spec("a", rank=8, seed=1),
    spec("b", rank=32, targets=Targets(mlp=False), seed=2),
    spec("c", rank=4, targets=Targets(attn=False, unembed=False), seed=3),
    spec("d", rank=4, targets=Targets(attn=False, mlp=False), seed=4),
)


def checkpointing(trainer: Trainer, mode: str) -> Trainer:
    trainer.budget = Budget(Settings(activation_checkpointing=mode), CPU)
    return trainer


def mixed_items() -> list[Any]:
    rng = np.random.default_rng(3)
    return [
        item("a", [datum(rng, 30), datum(rng, 7)], seq=1),
        item("a", [datum(rng, 70, "importance_sampling")], seq=2, loss="importance_sampling"),
        item("b", [datum(rng, 21), datum(rng, 40)]),
        item("c", [datum(rng, 50, "gspo")], loss="gspo"),
        item("c", [datum(rng, 12)], seq=2, backward=False),
        item("d", [datum(rng, 33)]),
    ]


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "merged"])
@pytest.mark.parametrize("max_tokens", [10**6, 60, 1])
def test_the_bits_are_those_without(base: BaseModel, threads: int, max_tokens: int, deterministic: bool) -> None:
    """Runs of all ranks and targets, some layers without an adapter, packs of any size, forward-only requests."""
    kept, recomputed = (
        checkpointing(make_trainer(base, *RUNS, deterministic=deterministic), mode) for mode in ("never", "always")
    )
    items = mixed_items()
    for one, other in zip(run_pass(kept, items, max_tokens), run_pass(recomputed, items, max_tokens), strict=True):
        assert_same_result(one, other)
    for run in RUNS:
        assert_same_bits(grads(kept, run.run_id), grads(recomputed, run.run_id))


def test_every_layer_is_computed_twice_and_no_more(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none without need: by default nothing is recomputed."""
    calls: list[str] = []
    layer = type(next(m for n, m in base.backbone.named_modules() if n.endswith("mlp")))
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: (calls.append("mlp"), forward(self, x))[1])
    items = [item("a", [datum(np.random.default_rng(0), 40)])]
    run_pass(make_trainer(base, RUNS[0]), items)
    assert len(calls) == base.num_layers
    run_pass(checkpointing(make_trainer(base, RUNS[0]), "always"), items)
    assert len(calls) == 3 * base.num_layers


def test_it_takes_less_memory_and_the_probe_sees_how_much(deep_base: BaseModel) -> None:
    """What the probe measures on small passes holds for a larger one within the margin that the budget leaves."""
    footprint = measure(deep_base, chunk_tokens=64)
    assert footprint.recomputed < 0.4 * footprint.kept
    assert deep_base.num_forwards == 0
    items = [item("a", [datum(np.random.default_rng(0), 1024)])]
    for mode, expected in (("never", footprint.kept), ("always", footprint.recomputed)):
        trainer = checkpointing(make_trainer(deep_base, spec("a", rank=32), chunk_tokens=64), mode)
        with PeakMeter() as meter:
            run_pass(trainer, items)
        row_bytes = 4 * trainer._slots[RUNS[0].run_id].layout.num_params
        assert meter.peak - row_bytes == pytest.approx(1024 * expected, rel=MARGIN - 1)
    deep_base.num_forwards = 0
