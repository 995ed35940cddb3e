"""Each loss against a few lines of plain PyTorch on the peft model: value, log-probabilities and gradient."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics.lab import (
    PeftTwin,
    assert_same_bits,
    assert_same_result,
    datum,
    grads,
    make_trainer,
    relative,
    run_pass,
    spec,
)
from tinsmith.training.losses import LOSSES, NativeLoss
from tinsmith.types import Datum, LossSpec, OpId, RunId, TrainItem
from tinsmith.validate.requests import LOSSES as OFFERED

Plain = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def plain_ppo(low: float, high: float) -> Plain:
    def loss(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
        r = (lp - x["logprobs"]).exp()
        return -torch.minimum(r * x["advantages"], torch.clamp(r, low, high) * x["advantages"]).sum()

    return loss


def plain_cispo(low: float, high: float) -> Plain:
    def loss(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
        r = (lp - x["logprobs"]).exp().detach()
        return -(torch.clamp(r, low, high) * lp * x["advantages"]).sum()

    return loss


def plain_dro(beta: float) -> Plain:
    def loss(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
        return -(lp * x["advantages"] - beta / 2 * (lp - x["logprobs"]).square()).sum()

    return loss


def plain_ppo_by_token(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=lp.dtype)
    for i in range(len(lp)):
        r = (lp[i] - x["logprobs"][i]).exp()
        low, high = float(x["clip_low_threshold"][i]), float(x["clip_high_threshold"][i])
        total = total - torch.minimum(r * x["advantages"][i], torch.clamp(r, low, high) * x["advantages"][i])
    return total


def plain_cispo_by_token(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=lp.dtype)
    for i in range(len(lp)):
        r = float((lp[i] - x["logprobs"][i]).exp().detach())
        total = total - min(max(r, 0.0), float(x["clip_high_threshold"][i])) * lp[i] * x["advantages"][i]
    return total


def plain_gspo(low: float, high: float) -> Plain:
    """The gradient of the paper's eq. 5 for a sequence, spelt out: where it isn't clipped, s·A·∇lp for each token."""

    def loss(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
        marked = [i for i in range(len(lp)) if x["sequence_ratio_mask"][i] != 0]
        s = math.exp(sum(float(lp[i].detach()) - float(x["logprobs"][i]) for i in marked) / len(marked))
        total = torch.zeros((), dtype=lp.dtype)
        for i in range(len(lp)):
            a = float(x["advantages"][i])
            is_clipped = (s > high and a > 0) or (s < low and a < 0)
            value = min(s * a, min(max(s, low), high) * a)
            total = total - (value if is_clipped else value + s * a * (lp[i] - float(lp[i].detach())))
        return total

    return loss


def plain_cross_entropy(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    return -(x["weights"] * lp).sum()


def plain_importance_sampling(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    return -((lp - x["logprobs"]).exp() * x["advantages"]).sum()


CASES: list[tuple[LossSpec, Plain]] = [
    (LossSpec("cross_entropy"), plain_cross_entropy),
    (LossSpec("importance_sampling"), plain_importance_sampling),
    (LossSpec("ppo"), plain_ppo(0.8, 1.2)),
    (LossSpec("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}), plain_ppo(0.5, 3.0)),
    (LossSpec("cispo"), plain_cispo(0.0, 4.0)),
    (LossSpec("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}), plain_cispo(0.9, 1.1)),
    (LossSpec("dro"), plain_dro(0.05)),
    (LossSpec("dro", {"beta": 0.7}), plain_dro(0.7)),
    (LossSpec("gspo"), plain_gspo(0.8, 1.2)),
    (LossSpec("gspo", {"clip_low_threshold": 0.999, "clip_high_threshold": 1.001}), plain_gspo(0.999, 1.001)),
    (LossSpec("ppo"), plain_ppo_by_token),
    (LossSpec("cispo"), plain_cispo_by_token),
]
BY_TOKEN = (plain_ppo_by_token, plain_cispo_by_token)
IDS = [f"{loss.name}-{plain.__name__}-{'-'.join(map(str, loss.config.values()))}" for loss, plain in CASES]


def near_policy(rng: np.random.Generator, length: int, loss: str, lp: np.ndarray, plain: Plain) -> Datum:
    """Sampling log-probabilities around the present ones, so that ratios fall on both sides of the thresholds."""
    made = datum(rng, length, loss)
    if loss == "cross_entropy":
        return made
    inputs = {**made.inputs, "logprobs": (lp + rng.normal(0, 0.6, length)).astype(np.float32)}
    if plain in BY_TOKEN:
        inputs["clip_high_threshold"] = rng.uniform(1.01, 1.5, length).astype(np.float32)
    if plain is plain_ppo_by_token:
        inputs["clip_low_threshold"] = rng.uniform(0.5, 0.99, length).astype(np.float32)
    return Datum(made.tokens, inputs)


@pytest.mark.parametrize(("loss", "plain"), CASES, ids=IDS)
def test_value_and_gradient(base, loss, plain):
    """Through the whole model, beside transformers and peft in float64: the loss and each parameter's gradient."""
    rng = np.random.default_rng(3)
    trainer = make_trainer(base, spec("a", 8))
    first = [datum(rng, n, loss.name) for n in (9, 40)]
    (probe,) = run_pass(trainer, [TrainItem(OpId("p"), RunId("a"), 1, tuple(first), LossSpec("cross_entropy"), False)])
    data = tuple(
        Datum(
            d.tokens,
            {
                **near_policy(rng, len(d.tokens), loss.name, lp, plain).inputs,
                "target_tokens": d.inputs["target_tokens"],
            },
        )
        for d, lp in zip(first, probe.logprobs, strict=True)
    )
    (result,) = run_pass(trainer, [TrainItem(OpId("o"), RunId("a"), 2, data, loss, True)])
    twin = PeftTwin(base, trainer.export_run(RunId("a")))
    twin.model.double()
    total = torch.zeros((), dtype=torch.float64)
    for d in data:
        logits = twin.model(input_ids=torch.from_numpy(d.tokens.astype(np.int64))[None]).logits[0]
        inputs = {
            n: torch.from_numpy(a).double() if a.dtype == np.float32 else torch.from_numpy(a)
            for n, a in d.inputs.items()
        }
        lp = logits.log_softmax(-1).gather(1, inputs["target_tokens"][:, None])[:, 0]
        total = total + plain(lp, inputs)
    total.backward()
    assert result.metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=1e-5, abs=0)
    errors = {name: relative(grads(trainer, "a")[f"grad/{name}"], p.grad) for name, p in twin.params.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("seed", range(9, 14))
@pytest.mark.parametrize(("loss", "plain"), CASES, ids=IDS)
def test_value_and_coefficients_within_a_millionth(loss, plain, seed):
    """The loss as a function of the log-probabilities alone: value and each derivative, relative to plain float64.

    Terms of either sign cancel in these sums, and nothing absolute is forgiven; what should be 0 is 0.
    """
    rng = np.random.default_rng(seed)
    lp = torch.from_numpy(rng.normal(-1.5, 0.5, 64).astype(np.float32))
    made = near_policy(rng, 64, loss.name, lp.numpy(), plain)
    inputs = {name: torch.from_numpy(array) for name, array in made.inputs.items()}
    found = NativeLoss(LOSSES[loss.name], loss.config).evaluate(lp, inputs)
    value, coef = found.loss, found.coef
    exact_lp = lp.double().requires_grad_()
    exact = plain(exact_lp, {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    (exact_coef,) = torch.autograd.grad(exact, exact_lp)
    assert coef.dtype == torch.float32
    assert value == pytest.approx(float(exact.detach()), rel=1e-6, abs=0)
    torch.testing.assert_close(coef.double(), exact_coef, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_targets", [0, 3])
def test_weights_left_out_are_ones(num_targets):
    rng = np.random.default_rng(9)
    lp = torch.from_numpy(rng.normal(-1.5, 0.5, (64, num_targets) if num_targets else 64).astype(np.float32))
    found = NativeLoss(LOSSES["cross_entropy"], {}).evaluate(lp, {})
    assert found.loss == pytest.approx(-float(lp.double().sum()), rel=1e-6, abs=0)
    assert bool((found.coef == -1).all())


def test_losses_and_settings_mix_in_one_pass(base):
    """All losses and settings of eight runs in one forward give each the bits that it has alone."""
    rng = np.random.default_rng(10)
    specs = [spec(f"r{i}", 4 + 2 * (i % 3), seed=i) for i in range(len(CASES))]
    items = [
        TrainItem(OpId(f"o{i}"), RunId(f"r{i}"), 1, (datum(rng, 12 + i, loss.name),), loss, True)
        for i, (loss, _) in enumerate(CASES)
    ]
    together = make_trainer(base, *specs)
    before = base.num_forwards
    results = run_pass(together, items)
    assert base.num_forwards == before + 1
    for one, item, result in zip(specs, items, results, strict=True):
        alone = make_trainer(base, one)
        (expected,) = run_pass(alone, [item])
        assert_same_result(result, expected)
        assert_same_bits(grads(together, one.run_id), grads(alone, one.run_id))


def test_the_engine_computes_exactly_the_losses_on_offer():
    assert LOSSES.keys() == OFFERED.keys()
