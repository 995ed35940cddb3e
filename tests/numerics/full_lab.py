"""Full runs and their samplers in one process: trained, published, sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tests.numerics.lab import datum, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import Letters
from tinsmith.config import Settings
from tinsmith.model import BaseModel
from tinsmith.sampling import FullSamplers
from tinsmith.training import Trainer
from tinsmith.types import AdamParams, Datum, Failure, OpId, OptimItem, RunId, RunState, SampleItem

FULL = replace(spec("f"), rank=0)


def make_pair(base: BaseModel, **settings: Any) -> tuple[Trainer, FullSamplers]:
    trainer = make_trainer(base)
    trainer.create_run(FULL)
    return trainer, FullSamplers(trainer.full, Settings(deterministic=True, **settings), Letters())


def train(trainer: Trainer, learning_rate: float = 3e-3, seed: int = 4) -> None:
    rng = np.random.default_rng(seed)
    run_pass(trainer, [item("f", [datum(rng, 20)])])
    (result,) = trainer.optim_step([OptimItem(OpId("x"), RunId("f"), AdamParams(learning_rate=learning_rate))])
    assert not isinstance(result, Failure)


def publish(trainer: Trainer, samplers: FullSamplers, key: str) -> RunState:
    weights = trainer.copy_weights(RunId("f"))
    samplers.publish(key, weights)
    return weights.on_host()


def run_all(samplers: FullSamplers, *items: SampleItem) -> Mapping[str, Any]:
    for one in items:
        samplers.submit(one)
    found: dict[str, Any] = {}
    while samplers.num_samples:
        found |= dict(samplers.step()[0])
    return found


def logprobs(trainer: Trainer, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the trainer gives for all but the first."""
    own = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
    own.inputs["weights"] = np.ones(len(tokens) - 1, np.float32)
    (result,) = run_pass(trainer, [item("f", [own], backward=False)])
    return result.logprobs[0]
