"""The losses, each a few lines on the log-probabilities of one datum's targets.

A loss is a sum over tokens; nothing is normalised. Its derivative with respect to each log-probability comes from
autograd, and is all that the rest of the backward pass needs. Formulas and their sources: docs/reference/losses.md.
Shape letters: N tokens, K targets a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tinsmith.errors import TinsmithError, UserError
from tinsmith.training.graph import ERRORS, GraphProgram
from tinsmith.training.shortage import is_out_of_memory
from tinsmith.types import LossSpec

Config = Mapping[str, float | str]
LossFn = Callable[[Tensor, Mapping[str, Tensor], Config], Tensor]

TARGETS = "target_tokens"
TOKEN_ELEMENTS = 2**14  # of a custom loss's values; to make them and go back costs about as much as a token
LOW, HIGH = "clip_low_threshold", "clip_high_threshold"


@dataclass(frozen=True, slots=True)
class Loss:
    """`fn(lp, inputs, config)` -> the terms to be summed; lp float64 [N, K] or [N], as the datum's targets are, and so
    are the inputs and the terms.

    is_tokenwise: a sum of terms of one token each, so that it may be evaluated on parts of a datum.
    """

    fn: LossFn
    is_tokenwise: bool = True


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A loss, its derivative with respect to each log-probability (shaped as they are), and metrics of the datum."""

    loss: float
    coef: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class OpLoss(Protocol):
    """The loss of one request."""

    @property
    def is_tokenwise(self) -> bool: ...

    def evaluate(self, lp: Tensor, inputs: Mapping[str, Tensor]) -> Evaluation:
        """Raises: UserError: a custom loss that can't be carried out on this datum."""
        ...

    def work(self, num_tokens: int) -> int:
        """What a datum of so many tokens costs to compute, in tokens, as far as is known by now."""
        ...


def cross_entropy(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ w·lp; weights of any sign, 1 if absent."""
    weights = inputs.get("weights")
    return -(lp if weights is None else weights * lp)


def importance_sampling(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ exp(lp - q)·A, with q the sampler's log-probabilities and A the advantages."""
    return -(torch.exp(lp - inputs["logprobs"]) * inputs["advantages"])


def ppo(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ min(r·A, clamp(r, low, high)·A) with r = exp(lp - q); the thresholds are ratios. arXiv 1707.06347, eq. 7."""
    ratio = torch.exp(lp - inputs["logprobs"])
    return _clipped_objective(ratio, inputs, config, 0.8, 1.2)


def cispo(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ sg(clamp(r, low, high))·lp·A: the clipped ratio is a weight, so every token keeps a gradient.

    arXiv 2506.13585, eq. 4.
    """
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    return -(_clip(ratio, inputs, config, 0.0, 4.0) * lp * inputs["advantages"])


def dro(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ (lp·A - ½·beta·(lp - q)²): a quadratic pull to the sampler's policy in place of clipping. arXiv 2405.19107."""
    beta = float(config.get("beta", 0.05))
    distance = lp - inputs["logprobs"]
    return -(lp * inputs["advantages"] - 0.5 * beta * distance**2)


def gspo(lp: Tensor, inputs: Mapping[str, Tensor], config: Config) -> Tensor:
    """-Σ min(s_t·A, clamp(s_t, low, high)·A) with s_t = sg(s)·exp(lp - sg(lp)), s = exp(mean of lp - q over the mask).

    One ratio for the sequence, the length-normalised one, with each token's own gradient. arXiv 2507.18071, eq. 14.
    """
    mask = inputs["sequence_ratio_mask"] != 0
    fixed = lp.detach()
    sequence_ratio = torch.exp((fixed - inputs["logprobs"])[mask].mean())
    return _clipped_objective(sequence_ratio * torch.exp(lp - fixed), inputs, config, 0.8, 1.2)


def _clipped_objective(ratio: Tensor, inputs: Mapping[str, Tensor], config: Config, low: float, high: float) -> Tensor:
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clip(ratio, inputs, config, low, high) * advantages)


def _clip(ratio: Tensor, inputs: Mapping[str, Tensor], config: Config, low: float, high: float) -> Tensor:
    """The ratio between the thresholds: a token's own where the inputs hold them, else those of the settings."""
    if LOW not in inputs and HIGH not in inputs:
        return ratio.clamp(float(config.get(LOW, low)), float(config.get(HIGH, high)))
    low_N, high_N = (
        inputs[name] if name in inputs else torch.full_like(ratio, float(config.get(name, default)))
        for name, default in ((LOW, low), (HIGH, high))
    )
    return ratio.clamp(low_N, high_N)


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy),
    "importance_sampling": Loss(importance_sampling),
    "ppo": Loss(ppo),
    "cispo": Loss(cispo),
    "dro": Loss(dro),
    "gspo": Loss(gspo, is_tokenwise=False),
}


class NativeLoss:
    """One of LOSSES with a request's settings. Those with the same `key` are the same function."""

    def __init__(self, loss: Loss, config: Config) -> None:
        self.key = (loss.fn, tuple(sorted(config.items())))
        self._loss = loss
        self._config = config
        self.is_tokenwise = loss.is_tokenwise

    def evaluate(self, lp: Tensor, inputs: Mapping[str, Tensor]) -> Evaluation:
        """In double precision: terms of either sign cancel, and a sum of scalars costs nothing beside the logits."""
        terms, coef = self.evaluate_terms(lp, inputs)
        return Evaluation(float(terms.sum()), coef)

    def evaluate_terms(self, lp: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The terms of the sum, float64, and the derivative of the sum with respect to each log-probability."""
        exact = {name: array.double() if array.is_floating_point() else array for name, array in inputs.items()}
        with torch.enable_grad():
            leaf = lp.detach().requires_grad_()
            terms = self._loss.fn(leaf.double(), exact, self._config)
            (coef,) = torch.autograd.grad(terms.sum(), leaf)
        return terms.detach(), coef

    def work(self, num_tokens: int) -> int:
        return num_tokens


class CustomLoss:
    """A request's uploaded loss, of whole data."""

    is_tokenwise = False

    def __init__(self, program: GraphProgram) -> None:
        self._program = program

    def evaluate(self, lp: Tensor, inputs: Mapping[str, Tensor]) -> Evaluation:
        with torch.enable_grad():
            leaf = lp.detach().requires_grad_()
            value, metrics = self._program.run(leaf, inputs)
            try:
                (coef,) = torch.autograd.grad(value, leaf)
            except ERRORS as error:
                if is_out_of_memory(error):
                    raise
                raise UserError(f"custom loss: it has no gradient: {str(error)[:300]}") from None
        return Evaluation(float(value.detach()), coef, {key: _metric(key, metrics[key]) for key in metrics})

    def work(self, num_tokens: int) -> int:
        """Counts the elements of its values too, going by the data so far."""
        num_elements = int(self._program.elements_per_token * num_tokens)
        return num_tokens + self._program.num_calls + num_elements // TOKEN_ELEMENTS


def loss_of(spec: LossSpec) -> OpLoss:
    """The loss that a request asks for, ready to be evaluated on its data."""
    if spec.name == "custom":
        if spec.graph is None:
            raise TinsmithError("a custom loss came without its graph")
        return CustomLoss(GraphProgram(spec.graph))
    return NativeLoss(LOSSES[spec.name], spec.config)


def _metric(key: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, int | float):
        return float(value)
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UserError(f"custom loss: metric {key} must be a scalar, not {shape}: sum it")
