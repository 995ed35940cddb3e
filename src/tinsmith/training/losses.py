"""The losses, each a few lines on the log-probabilities of one datum's targets.

A loss is a sum over tokens; nothing is normalised. Its derivative with respect to each log-probability comes from
autograd, and is all that the rest of the backward pass needs.
Formulas: https://tinker-docs.thinkingmachines.ai/losses. Shape letters: N tokens, K targets a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Config = Mapping[str, float | str]
LossFn = Callable[[Tensor, Mapping[str, Tensor], Config], Tensor]

TARGETS = "target_tokens"


@dataclass(frozen=True, slots=True)
class Loss:
    """`fn(lp, inputs, config)` -> scalar; lp float64 [N, K] or [N], as the datum's targets are, and so are the inputs.

    is_tokenwise: a sum of terms of one token each, so that it may be evaluated on parts of a datum.
    """

    fn: LossFn
    is_tokenwise: bool = True


def cross_entropy(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ w·lp; weights of any sign, 1 if absent."""
    weights = inputs.get("weights")
    return -(lp if weights is None else weights * lp).sum()


def importance_sampling(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ exp(lp - q)·A, with q the sampler's log-probabilities and A the advantages."""
    return -(torch.exp(lp - inputs["logprobs"]) * inputs["advantages"]).sum()


def ppo(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ min(r·A, clamp(r, low, high)·A) with r = exp(lp - q); the thresholds are ratios. arXiv 1707.06347, eq. 7."""
    ratio = torch.exp(lp - inputs["logprobs"])
    clipped = ratio.clamp(*_thresholds(config, 0.8, 1.2))
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"]).sum()


def cispo(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ sg(clamp(r, low, high))·lp·A: the clipped ratio is a weight, so every token keeps a gradient.

    arXiv 2506.13585, eq. 4.
    """
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    clipped = ratio.clamp(*_thresholds(config, 0.0, 4.0))
    return -(clipped * lp * inputs["advantages"]).sum()


def dro(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ (lp·A - ½·beta·(lp - q)²): a quadratic pull to the sampler's policy in place of clipping. arXiv 2405.19107."""
    beta = float(config.get("beta", 0.05))
    distance = lp - inputs["logprobs"]
    return -(lp * inputs["advantages"] - 0.5 * beta * distance**2).sum()


def _thresholds(config: Config, low: float, high: float) -> tuple[float, float]:
    return float(config.get("clip_low_threshold", low)), float(config.get("clip_high_threshold", high))


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy),
    "importance_sampling": Loss(importance_sampling),
    "ppo": Loss(ppo),
    "cispo": Loss(cispo),
    "dro": Loss(dro),
}


def evaluate(loss: Loss, lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> tuple[float, Tensor]:
    """The loss and its derivative with respect to each log-probability, shaped and typed as `lp`.

    Computed in double precision: terms of either sign cancel, and a sum of scalars costs nothing beside the logits.
    """
    exact = {name: array.double() if array.is_floating_point() else array for name, array in inputs.items()}
    with torch.enable_grad():
        leaf = lp.detach().requires_grad_()
        value = loss.fn(leaf.double(), exact, config)
        (coef,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), coef
