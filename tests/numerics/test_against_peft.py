"""The engine against peft and transformers, which nobody here wrote: logprobs, gradients and optimizer steps."""

import numpy as np
import pytest
import torch

from tests.numerics.lab import PeftTwin, datum, grads, item, make_trainer, relative, run_pass, spec
from tinsmith.types import AdamParams, OpId, OptimItem, RunId, Targets

BOUND = 1e-5
RUNS = (
    spec("a", 8),
    spec("b", 3, Targets(attn=True, mlp=False, unembed=False), seed=2),
    spec("c", 16, Targets(attn=False, mlp=True, unembed=True), seed=3),
)


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling"])
def test_logprobs_and_gradients(base, loss):
    rng = np.random.default_rng(0)
    trainer = make_trainer(base, *RUNS)
    items = [item(run.run_id, [datum(rng, n, loss) for n in (7, 40, 66)], loss=loss) for run in RUNS]
    results = run_pass(trainer, items)
    for run, one, result in zip(RUNS, items, results, strict=True):
        twin = PeftTwin(base, trainer.export_run(run.run_id))
        total, logprobs = twin.backward(one.data, loss)
        assert result.metrics["loss:sum"] == pytest.approx(total, rel=BOUND, abs=1e-3)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
        errors = {name: relative(grads(trainer, run.run_id)[f"grad/{name}"], p.grad) for name, p in twin.params.items()}
        assert max(errors.values()) < BOUND, errors


def test_many_targets_a_position(base):
    rng = np.random.default_rng(3)
    trainer = make_trainer(base, RUNS[0])
    data = [datum(rng, n, num_targets=4) for n in (11, 45)]
    (result,) = run_pass(trainer, [item("a", data)])
    twin = PeftTwin(base, trainer.export_run(RunId("a")))
    _, logprobs = twin.backward(data)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        assert ours.shape == tuple(theirs.shape)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
    errors = {name: relative(grads(trainer, "a")[f"grad/{name}"], p.grad) for name, p in twin.params.items()}
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize(
    "params",
    [
        AdamParams(learning_rate=1e-3, eps=1e-8),
        AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.99, eps=1e-12, weight_decay=0.1, grad_clip_norm=0.5),
    ],
    ids=["plain", "decay_and_clip"],
)
def test_five_steps_of_adamw(base, params):
    """eps stays far from the gradients: where |g| is about eps, Adam turns g's rounding into a different step."""
    rng = np.random.default_rng(4)
    trainer = make_trainer(base, RUNS[0], RUNS[1])
    twin = PeftTwin(base, trainer.export_run(RunId("a")))
    optimizer = torch.optim.AdamW(
        twin.params.values(), lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps,
        weight_decay=params.weight_decay,
    )  # fmt: skip
    for step in range(5):
        data = [datum(rng, n) for n in (20, 33)]
        run_pass(trainer, [item("a", data), item("b", [datum(rng, 9)])])
        other = AdamParams(learning_rate=0.3)
        ours, _ = trainer.optim_step(
            [OptimItem(OpId("x"), RunId("a"), params), OptimItem(OpId("y"), RunId("b"), other)]
        )
        optimizer.zero_grad()
        twin.backward(data)
        norm = torch.nn.utils.clip_grad_norm_(twin.params.values(), params.grad_clip_norm or float("inf"))
        optimizer.step()
        assert ours.metrics["grad_norm"] == pytest.approx(float(norm), rel=BOUND)
        assert ours.metrics["optimizer_step"] == step + 1
    tensors = trainer.export_run(RunId("a"), ("param",)).tensors
    errors = {name: relative(tensors[f"param/{name}"], p) for name, p in twin.params.items()}
    assert max(errors.values()) < BOUND, errors
